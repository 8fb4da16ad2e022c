"""cgroup v2: directories that are held open, their interface files, and changes of those.

May import host, units and errors.
"""
