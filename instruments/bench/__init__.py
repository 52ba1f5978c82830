"""`moebox bench`: prompts and decoding of a model, measured beside the floor of the box."""
