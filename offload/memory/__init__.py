"""Experts in memory: the slabs in RAM and on the GPU, and which expert has which row."""
