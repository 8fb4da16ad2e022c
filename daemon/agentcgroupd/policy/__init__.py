"""Policies: their documents, decisions, learning and explanations, without a clock.

May import intents, configuration, units and errors; nothing that touches the kernel.
"""
