"""Ends of calls drawn at random, carried out on a real kernel, and compared with their reports.

`plans` draws what a tool does and who ends it; `tool` is the tool; `carry` runs a plan against a
daemon; `oracle` says from the plan, and from what a parent saw by waitpid(2), what the report has
to say. Nothing here uses the daemon's code.
"""
