"""quantize/output"""
