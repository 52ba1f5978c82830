"""Checkpoints on disk: safetensors headers, the byte layout of an INT4 expert, and where experts lie in shards."""
