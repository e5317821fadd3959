"""Many small trainings beside each other: which mixers learn what, with how many softmax layers among them."""
