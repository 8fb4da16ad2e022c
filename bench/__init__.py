"""Benchmarks: a folder for each, whose __init__ says what is measured against which target."""
