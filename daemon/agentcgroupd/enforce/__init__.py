"""Writes of decisions to the kernel: limits, freezing, slowing, reclaim, kills.

May import state, telemetry and everything below.
"""
