"""Energy of GPU, processors and memory, measured or estimated, and its division among requests."""
