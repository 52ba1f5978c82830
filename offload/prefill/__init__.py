"""The experts of prompts: many tokens at once, layer by layer, on two roads."""
