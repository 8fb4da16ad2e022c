"""GPU sharing: who may open the devices, how much memory, whose turn it is.

Start at `control.py`. What a call gets: `room.py`; whose turn it is: `arbiter.py`; the rungs that
hold a memory quota: `quota.py`.
"""
