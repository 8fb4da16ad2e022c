"""Plans of ends: what a tool does, how it comes to its end, and who ends it."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass

DEADLY = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGSEGV, signal.SIGHUP)
CHILDREN = ("plain", "setsid", "double fork", "deaf", "nested")
"""Kinds of processes that a tool leaves running."""
OOMS = ("call", "nested", "session")


@dataclass(frozen=True)
class Plan:
    """An end. All happens in this order: children, the way out, the OOM kill of a child, the
    tool's own end, and then whoever ends the call."""

    seed: int
    held: bool
    """Whether the agent holds the call open, instead of the launcher's own call."""
    children: tuple[str, ...] = ()
    leaves: str = ""
    """Where the main process moves itself: `elsewhere`, `agent`, or nowhere."""
    leaver: str = "itself"
    """Who writes its pid to the other cgroup: `itself`, or a `child`."""
    child_oom: bool = False
    """Whether a child runs out of memory in a nested cgroup before the end."""
    end: str = "exit"
    """`exit`, `signal`, `oom`, or `never`: it runs until somebody ends it."""
    code: int = 0
    number: int = 0
    oom: str = ""
    """The level of the limit at which the main process runs out of memory."""
    thread: bool = False
    """Whether its main thread has ended and another one goes on."""
    on_term: str = ""
    """What it does on SIGTERM: die, `ignore`, or `exit` with `code`."""
    ender: str = "none"
    """`none`, `timeout`, `agent`, `operator`, `session`, `caller`: the agent kills the main process
    itself, and then ends the call; or `detach`: the agent lets go of the call, and the tool ends by
    itself after that."""
    reason: int = 0
    """Number of the EndReason that the agent gives."""


def draw(seed: int, limits: bool) -> Plan:
    """Draw a plan. `limits`: whether limits of memory are kept here."""
    rng = random.Random(seed)
    end = rng.choices(["exit", "signal", "never", "oom"], [5, 3, 6, 3 if limits else 0])[0]
    oom = rng.choice(OOMS) if end == "oom" else ""
    leaves = rng.choices(["", "elsewhere", "agent"], [7, 2, 1])[0] if not oom else ""
    child_oom = limits and not leaves and not oom and rng.random() < 0.3
    count = rng.choices([0, 1, 2, 4], [5, 2, 2, 1])[0]
    children = tuple(rng.choice(CHILDREN) for _ in range(count))
    if leaves or oom == "session":
        children = tuple("plain" if kind == "nested" else kind for kind in children)
    thread = not oom and not leaves and rng.random() < 0.2
    on_term = rng.choices(["", "ignore", "exit"], [3, 1, 1])[0]
    if thread and on_term == "exit":
        on_term = "ignore"  # a handler of Python's runs in the main thread only
    if end == "signal":
        on_term = ""
    enders = ["none", "timeout", "agent", "operator", "session", "caller", "detach"]
    ender = rng.choices(enders, [6, 4, 4, 2, 1, 3, 4])[0]
    if ender == "detach" and (end not in ("exit", "signal") or children):
        ender = "agent"  # what goes on, or is left, would have to be ended all the same
    if end == "never" or children:
        while ender == "none":
            ender = rng.choices(enders, [0, 4, 4, 2, 1, 3, 0])[0]
    return Plan(
        seed=seed,
        held=ender in ("agent", "caller", "detach") or rng.random() < 0.4,
        children=children,
        leaves=leaves,
        leaver=rng.choice(["itself", "child"]),
        child_oom=child_oom,
        end=end,
        code=rng.choice([0, 0, 1, 2, 77, 137, 143, 255]),
        number=int(rng.choice(DEADLY)),
        oom=oom,
        thread=thread,
        on_term=on_term,
        ender=ender,
        reason=rng.randrange(4) if ender in ("agent", "caller", "detach") else 1,
    )
