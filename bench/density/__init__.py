"""Recorded agents that a pool carries, against 9 times (18 with zram 3:1; 7 on 8 GB) the number
whose peaks could be reserved."""
