"""What one device computes of its tokens: no ranks, no process groups."""
