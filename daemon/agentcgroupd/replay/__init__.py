"""Recordings of real agents, and how to run them again as real processes.

`trace` reads and writes recordings, `record` makes them, `plan` turns one into a schedule, `engine`
runs several schedules at once on a pool of limited memory, `plot` draws what happened.
"""
