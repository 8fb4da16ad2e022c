"""Benchmark `sealed`: calls in sandboxes that refuse sockets."""
