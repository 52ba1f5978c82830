"""Looking at checkpoints: what a folder holds (`inspect`), and whether its bytes are what was written (`verify`)."""
