"""Convolutions as long as the sequence, over ranks: the operator, its kernels, and the ways in which ranks share the work."""
