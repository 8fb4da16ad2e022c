"""`agentcg otel`: a span of OpenTelemetry for each ended call, from a process beside the daemon.

`spans` makes a span of a report, `sending` sends spans without ever making anybody wait, and
`follow` hears of calls. Needs the extra `otel`.
"""
