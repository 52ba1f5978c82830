"""kernels/gpu/reference"""
