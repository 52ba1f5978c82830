"""cost/energy"""
