"""What a conversion writes: the layout of the shards, their writer, the journal and the small files."""
