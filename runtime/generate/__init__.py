"""Logits to tokens: sampling, and the loop of an answer."""
