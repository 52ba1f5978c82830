"""`moebox plan`: predicts where a model lies on a box and how fast it runs there, without loading it."""
