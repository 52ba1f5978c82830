"""quantize/source"""
