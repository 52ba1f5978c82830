"""What a conversion reads: where shards come from, what each tensor is for, and how its encoding is read."""
