"""What answers: the model, its engine, text, sampling, and the terminal."""
