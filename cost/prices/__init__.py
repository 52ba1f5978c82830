"""Prices of electricity and the box, and list prices of hosted models."""
