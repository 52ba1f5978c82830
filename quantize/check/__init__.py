"""quantize/check"""
