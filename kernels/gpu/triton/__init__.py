"""kernels/gpu/triton"""
