"""offload/decode"""
