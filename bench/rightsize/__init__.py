"""Commands that take as many workers as they count CPUs, in calls that are granted fewer, with and
without being told."""
