"""GPU kernels in Triton (`triton/`), and the same functions in plain torch (`reference/`)."""
