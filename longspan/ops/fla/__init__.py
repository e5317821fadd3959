"""The kernels of flash-linear-attention behind our chunk form."""
