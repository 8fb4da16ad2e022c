"""Calls and sessions that survive on a pool of half their demand, against all of them, and the
important session's time, against 1.05 times that of running alone."""
