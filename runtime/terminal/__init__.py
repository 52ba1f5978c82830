"""runtime/terminal"""
