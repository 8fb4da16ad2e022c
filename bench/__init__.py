"""Benchmarks: one module for each row of the table of targets, and the demo."""
