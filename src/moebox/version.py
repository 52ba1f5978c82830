"""The version: the one place where it is written. The build reads this file."""

__version__ = "0.2.0"
