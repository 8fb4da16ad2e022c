"""cgroup v2: interface files on a held directory, and events of theirs.

May import host, units and errors.
"""
