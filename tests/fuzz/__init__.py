"""Inputs at random, against everything that reads what others wrote.

`targets` holds what is tried, each a function of bytes that may raise only what its readers expect.
`test_fuzz.py` runs them with hypothesis, as a part of the suites; `python -m tests.fuzz TARGET`
with atheris, for as long as one likes.
"""
