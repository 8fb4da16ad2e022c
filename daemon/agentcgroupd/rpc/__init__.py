"""The doors of the daemon: sockets, who is calling, and answers as protobuf.

May import everything below; only the daemon itself imports this package.
"""
