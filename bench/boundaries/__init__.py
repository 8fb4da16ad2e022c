"""Calls without a report in a storm of shells that no agent declares, against none, and the time
from their exec to the end of their move, which has no target."""
