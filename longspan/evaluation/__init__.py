"""What a trained model is worth: its loss by position and by document, associative recall, keys hidden in long texts."""
