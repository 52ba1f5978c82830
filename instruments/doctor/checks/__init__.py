"""The checks of `moebox doctor`: a module for each part of the machine, a function for each check."""
