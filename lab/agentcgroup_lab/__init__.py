"""The laboratory: recordings of agents, their replay on a real kernel, and the simulator.

May import the daemon, which never imports it.
"""
