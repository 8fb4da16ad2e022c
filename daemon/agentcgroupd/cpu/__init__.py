"""CPU time: weights and limits, by the scheduler of bpf/sched.bpf.c where the kernel takes it.

May import sessions and everything below.
"""
