"""Benchmark `traffic`: what counting costs where sockets send and receive."""
