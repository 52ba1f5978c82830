"""Instruments: what measures a box and a model, and plans, checks and reports; only commands and benchmarks
import it."""
