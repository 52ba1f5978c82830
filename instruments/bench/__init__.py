"""instruments/bench"""
