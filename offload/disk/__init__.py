"""Experts on drives: where their bytes are read from."""
