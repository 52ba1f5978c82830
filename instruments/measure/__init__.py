"""Measurements that the instruments share: ceilings of the box, its load, models of random weights."""
