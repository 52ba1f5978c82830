"""offload/memory"""
