"""quantize/synth"""
