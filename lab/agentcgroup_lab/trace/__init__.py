"""Recordings: their file format, how they are made, and what a replay takes from them."""
