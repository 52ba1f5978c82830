"""`moebox chat` and `moebox run` in a terminal."""
