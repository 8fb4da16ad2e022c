"""Calls that nobody declares: what the kernel tells of processes becomes calls.

May import calls and everything below, but not the guard.
"""
