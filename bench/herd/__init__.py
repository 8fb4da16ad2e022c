"""Benchmark `herd`: calls that begin to grow at the same moment in a pool too small for all."""
