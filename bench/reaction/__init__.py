"""Time from the moment an allocator passes the mark to the moment it is stopped, against 1 ms at
the median and 5 ms at p99, and bytes past the limits that the kernel keeps, against none."""
