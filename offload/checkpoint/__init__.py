"""offload/checkpoint"""
