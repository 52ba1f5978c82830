"""`moebox doctor`: checks of the machine and of a model, with the cost and the fix of each finding."""
