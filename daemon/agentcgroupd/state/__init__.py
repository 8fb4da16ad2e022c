"""Sessions, calls and processes as the daemon knows them, and their records on cgroups.

May import policy, intents, cgroup and host.
"""
