"""cost/page"""
