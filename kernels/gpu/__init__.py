"""GPU kernels in Triton, and the same functions in plain torch; `ops.load_ops` chooses."""
