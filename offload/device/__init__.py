"""offload/device"""
