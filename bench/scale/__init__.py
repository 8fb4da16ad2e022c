"""Benchmark `scale`."""
