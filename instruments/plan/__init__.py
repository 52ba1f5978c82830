"""instruments/plan"""
