"""`agentcg web`: the pool in a browser, read-only, on loopback.

`watch` asks the daemon and remembers, `shown` and `timeline` make of that what a page gets, and
`server` hands it out to whoever has the token. What runs in the browser is in `assets/`.
"""
