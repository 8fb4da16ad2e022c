"""Replay of recordings on a real kernel, under one strategy or several."""
