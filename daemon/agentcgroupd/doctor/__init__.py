"""`agentcg doctor`: what this host can do, and what to do about what it cannot.

May import gpu, bpf, cgroup and host; the running daemon does not import this package.
"""
