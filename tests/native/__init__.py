"""The scheduler's order (bpf/sched_tree.h), compiled for this machine as an ordinary program."""
