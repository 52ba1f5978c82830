"""offload/routing"""
