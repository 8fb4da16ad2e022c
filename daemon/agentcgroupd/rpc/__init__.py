"""The daemon's sockets: who is calling (identity), gRPC (server) and entering a cgroup (attach)."""
