"""offload/machine"""
