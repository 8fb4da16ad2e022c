"""cgroup v2: typed interface files (knobs), directories (tree) and their notifications (events)."""
