"""Text to token files to batches: read documents, tokenize them once, verify, and hand out the batch of a step."""
