"""The architecture in Hugging Face's tensor names, and the loading of the backbone."""
