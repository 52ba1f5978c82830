"""offload/disk"""
