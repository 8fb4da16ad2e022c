"""What leaves the daemon for people and machines: audit log, events, metrics, protobuf.

May import state and everything below.
"""
