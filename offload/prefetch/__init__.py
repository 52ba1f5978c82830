"""Experts are read from the drive before their layers are routed, if that makes tokens faster."""
