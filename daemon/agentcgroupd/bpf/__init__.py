"""eBPF: programs of bpf/, loaded by libbpf through ctypes. The way: features, loader, libbpf.

May import cgroup, host, configuration, units and errors.
"""
