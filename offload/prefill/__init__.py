"""offload/prefill"""
