"""What `moebox doctor` looks at: a module for each part of the machine, a function for each check."""
