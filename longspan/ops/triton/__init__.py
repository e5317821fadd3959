"""GPU kernels in Triton for the variants with a diagonal transition. Imported when a call asks for them: they need triton."""
