"""Two to four tenants on one GPU: shares against what was granted (target 3 points), quotas held,
the time to take the GPU back for an important call (2 ms), and the throughput lost (5 %)."""
