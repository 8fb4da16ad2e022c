"""Wall time that a call adds to a bare spawn, against 2 ms at the median and 10 ms at p99, and
cgroups left behind by 10,000 calls, against none."""
