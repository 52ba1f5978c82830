"""instruments/measure"""
