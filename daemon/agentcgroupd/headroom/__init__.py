"""How many more agents a node can take, told to Kubernetes: a program of its own beside the daemon.

    python -m agentcgroupd.headroom

Reads the daemon's metrics, and keeps the extended resource `agentcgroup.dev/agents` of the node.
The daemon itself has no token of the cluster.
"""
