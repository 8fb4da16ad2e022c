"""Time that the programs in the kernel add to page faults and spawns, against 1 %."""
