"""The kernels: C++ for the CPU (`csrc/`, behind `cpu.py`), Triton and plain torch for the GPU (`gpu/`)."""
