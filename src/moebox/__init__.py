"""moebox: run trillion-parameter mixture-of-experts models of the Kimi K2 family on one box."""

__version__ = "0.1.0"
