"""`Ops` in Triton: kernels, and the functions that check arguments and launch them."""
