"""Simulation of recordings under the daemon's own policy, without processes or a clock."""
