"""The host below cgroups: system calls, mounts, zram, messages to systemd.

May import units and errors.
"""
