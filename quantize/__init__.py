"""Quantizing a checkpoint of the Kimi K2 family to INT4 experts."""
