"""eBPF: programs of bpf/, loaded by libbpf through ctypes. Where: features -> loader -> libbpf."""
