"""Native CPU kernels and their Python boundary."""
