"""Checkpoints on disk: safetensors headers, the bytes of an INT4 expert, and where experts lie in shards."""
