"""instruments/stats"""
