"""The model, its tokenizer and template, sampling and the terminal chat."""
