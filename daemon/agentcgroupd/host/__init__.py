"""The host below cgroups: system calls, zram, systemd's notifications.

May import units and errors.
"""
