"""The policy, without I/O or a clock: documents, decisions, learning, explanations.

May import intents, configuration, units and errors; nothing that touches the kernel.
"""
