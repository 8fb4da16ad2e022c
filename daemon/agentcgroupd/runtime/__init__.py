"""Containers that become sessions by themselves: what runtimes say of them, and what is done then.

May import sessions, telemetry, config and everything below; rpc and this package do not know each
other.
"""
