"""Benchmark `history`: what keeping it costs a call, and what asking a large one takes."""
