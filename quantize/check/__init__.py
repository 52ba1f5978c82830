"""Looking at checkpoints: what a folder holds (`inspect`), whether its bytes are unchanged (`verify`)."""
