"""The life of a call: asked for, waiting, begun, entered, ended, reported.

May import gpu, cpu, enforce, sessions and everything below.
"""
