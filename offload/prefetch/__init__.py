"""offload/prefetch"""
