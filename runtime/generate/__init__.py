"""runtime/generate"""
