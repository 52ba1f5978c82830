"""`Ops` in plain torch: the reference of the Triton kernels, and the kernels of the stand-in device."""
