"""The cluster's seconds: agents come, are placed, run, wait or lose a call, and go.

A node without the daemon: when more is asked for than it has, the kernel kills the largest call,
which its agent begins anew. A node with it: calls that want to grow wait, the oldest agent first,
and a call is ended only where nobody could go on otherwise.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from agentcgroup_lab.cluster.placing import Placing, make
from agentcgroup_lab.cluster.workload import Bytes, Flags, Indices, Kinds

SECONDS_MOST = 1_000_000
EMPTY_MOST_S = 600
"""How long agents may wait for a node while all nodes are empty: longer than headroom takes to
rise."""
THINK_S = 20
"""For which an agent thinks after a call of it was killed."""
TRIES = 3
"""How often it tries the same call."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is simulated."""

    nodes: int = 100
    node_bytes: float = 32e9
    sessions: int = 10_000
    arrive_s: int = 3600
    """Agents come evenly over this time."""
    seed: int = 1


@dataclass(slots=True)
class Outcome:
    """How it went."""

    placing: str
    daemon: bool
    calls_killed: int = 0
    calls_given_up: int = 0
    """Killed as often as an agent tries."""
    agents_lost: int = 0
    """Ended because all of a node's memory was agents', and each wanted more."""
    makespan_s: int = 0
    ideal_s: int = 0
    """The makespan if there were room for all at once."""
    waited_mean_s: float = 0.0
    """For a node."""
    slower: float = 0.0
    """Time on a node over the time undisturbed, of all agents together."""
    agents_on_node_most: int = 0
    nodes_mean: float = 0.0
    """Nodes with an agent, in the mean while there are any."""
    nodes_of_load: float = 0.0
    """Node seconds per agent hour: what the work costs."""
    use_mean: float = 0.0
    """Share of the memory of nodes with an agent."""
    over_time: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


class Simulation:
    """A cluster with a way of placing."""

    def __init__(self, kinds: Kinds, cluster: Cluster, placing: str, daemon: bool) -> None:
        self._kinds, self._cluster, self._daemon = kinds, cluster, daemon
        self._placing: Placing = make(placing, kinds, cluster.nodes, cluster.node_bytes)
        draw = random.Random(cluster.seed)
        count = cluster.sessions
        self._kind = np.array([draw.randrange(len(kinds.lengths)) for _ in range(count)])
        self._arrives = np.array(sorted(draw.randrange(cluster.arrive_s) for _ in range(count)))
        self._at = np.zeros(count, dtype=np.int64)
        """The second of its recording that each is in."""
        self._node = np.full(count, -1, dtype=np.int64)
        self._placed_s = np.zeros(count, dtype=np.int64)
        self._held = np.zeros(count)
        self._second = 0
        self._thinks_until = np.zeros(count, dtype=np.int64)
        self._tries = np.zeros(count, dtype=np.int64)
        self._reached = np.full(count, -1, dtype=np.int64)
        """The last second in which each has lost a call: beyond it, its tries are counted anew."""
        self._given_up_to = np.zeros(count, dtype=np.int64)
        """Where each goes on since it has given up a call; it never goes back before that."""
        self._active: Indices = np.zeros(0, dtype=np.int64)
        self._next = 0
        self._on_nodes = np.zeros(count, dtype=np.int64)
        self.outcome = Outcome(placing, daemon)

    def run(self) -> Outcome:
        """Run until all have ended. Raises RuntimeError where that takes SECONDS_MOST, or where no
        node takes an agent."""
        cluster, outcome = self._cluster, self.outcome
        busy, used_all, ticks = 0.0, 0.0, 0
        timeline: dict[str, list[float]] = {"sessions": [], "nodes": [], "waiting": []}
        second = empty_since = 0
        while self._next < cluster.sessions or len(self._active):
            if second > SECONDS_MOST:
                raise RuntimeError(f"the agents have not ended after {SECONDS_MOST:,} s")
            used = self._used()
            sessions = self._count()
            self._place(second, used, sessions)
            if len(self._active) or not self._waiting(second):
                empty_since = second
            elif second - empty_since > EMPTY_MOST_S:
                raise RuntimeError(f"placed by {outcome.placing}, no node has room for an agent")
            self._second = second
            self._tick()
            with_agent = sessions > 0
            nodes = int(with_agent.sum())
            busy += nodes
            used_all += float(used[with_agent].sum())
            ticks += nodes > 0
            outcome.agents_on_node_most = max(outcome.agents_on_node_most, int(sessions.max()))
            if second % 60 == 0:
                numbers = (len(self._active), nodes, self._waiting(second))
                for name, value in zip(timeline, numbers, strict=True):
                    timeline[name].append(float(value))
            second += 1
        self._sum_up(second, busy, used_all, ticks, timeline)
        return outcome

    def _sum_up(
        self,
        seconds: int,
        busy: float,
        used_all: float,
        ticks: int,
        timeline: dict[str, list[float]],
    ) -> None:
        outcome = self.outcome
        lengths = self._kinds.lengths[self._kind]
        outcome.makespan_s = seconds
        outcome.ideal_s = int((self._arrives + lengths).max())
        outcome.waited_mean_s = float((self._placed_s - self._arrives).mean())
        outcome.slower = float(self._on_nodes.sum() / lengths.sum())
        outcome.nodes_mean = busy / max(1, ticks)
        outcome.nodes_of_load = busy / (lengths.sum() / 3600)
        outcome.use_mean = used_all / max(1.0, busy * self._cluster.node_bytes)
        outcome.over_time = timeline

    def _waiting(self, second: int) -> int:
        """How many agents have come and have no node."""
        return max(0, int(np.searchsorted(self._arrives, second)) - self._next)

    def _count(self) -> Indices:
        return np.bincount(self._node[self._active], minlength=self._cluster.nodes)

    def _used(self) -> Bytes:
        if not len(self._active):
            return np.zeros(self._cluster.nodes)
        nodes, held = self._node[self._active], self._held[self._active]
        used = np.bincount(nodes, weights=held, minlength=self._cluster.nodes)
        return used.astype(np.float64)

    # Placing

    def _place(self, second: int, used: Bytes, sessions: Indices) -> None:
        """Place those that have come, on the fullest node that takes one more."""
        come = int(np.searchsorted(self._arrives, second, side="right"))
        room = self._placing.room(second, used, sessions) - sessions
        placed = []
        while self._next < come:
            free = np.flatnonzero(room > 0)
            if not len(free):
                break
            node = int(free[np.argmax(sessions[free])])
            agent = self._next
            self._node[agent], self._placed_s[agent] = node, second
            room[node] -= 1
            sessions[node] += 1
            placed.append(agent)
            self._next += 1
        if placed:
            self._active = np.concatenate((self._active, np.array(placed, dtype=np.int64)))

    # Running

    def _tick(self) -> None:
        """Let all run for a second, as far as their nodes have memory for them."""
        active = self._active
        if not len(active):
            return
        kinds, kind, at = self._kinds, self._kind[active], self._at[active]
        thinks = self._thinks_until[active] > self._second
        wanted = np.where(thinks, self._held[active], kinds.held[kind, at])
        nodes = self._node[active]
        total = np.bincount(nodes, weights=wanted, minlength=self._cluster.nodes)
        goes_on = ~thinks
        for node in np.flatnonzero(total > self._cluster.node_bytes):
            here = np.flatnonzero(nodes == node)
            if self._daemon:
                self._wait(active, here, wanted, goes_on)
            else:
                self._kill(active, here, wanted, goes_on)
        self._held[active[goes_on]] = wanted[goes_on]
        self._tell_ended(active[goes_on], kind[goes_on], at[goes_on])
        self._at[active[goes_on]] += 1
        self._on_nodes[active] += 1
        self._active = active[self._at[active] < kinds.lengths[kind]]

    def _wait(self, active: Indices, here: Indices, wanted: Bytes, goes_on: Flags) -> None:
        """Let those grow that fit, the oldest first; the others wait with what they hold."""
        everyone, here = here, here[goes_on[here]]  # the others think, and hold what they hold
        more = wanted[here] - self._held[active[here]]
        grows = more > 0
        free = self._cluster.node_bytes - self._waiting_bytes(active, here, wanted)
        moved = not grows.all()
        growers = here[grows]
        order = np.argsort(active[growers], kind="stable")
        for index, rise in zip(growers[order], more[grows][order], strict=True):
            if rise > free:
                goes_on[index] = False
            else:
                free -= rise
                moved = True
        if not moved:
            self._end_one(active, here, len(here) == len(everyone))

    def _waiting_bytes(self, active: Indices, here: Indices, wanted: Bytes) -> float:
        """What a node's agents hold if none of them grows."""
        node = self._node[active[here[0]]] if len(here) else -1
        all_here = self._node[active] == node
        return float(np.minimum(wanted[all_here], self._held[active[all_here]]).sum())

    def _kill(self, active: Indices, here: Indices, wanted: Bytes, goes_on: Flags) -> None:
        """Kill the largest calls until the others fit."""
        excess = float(wanted[here].sum()) - self._cluster.node_bytes
        for place in np.argsort(-wanted[here], kind="stable"):
            if excess <= 0:
                return
            index = here[place]
            freed = self._begin_anew(int(active[index]), float(wanted[index]))
            if freed is not None:
                goes_on[index] = False
                excess -= freed

    def _end_one(self, active: Indices, here: Indices, everyone: bool) -> None:
        """End the call of the youngest that has one: nobody could go on otherwise. Where there is
        no call, the youngest agent is lost, unless `everyone` is false: some will go on."""
        for agent in sorted(active[here].tolist(), reverse=True):
            if self._begin_anew(agent, float(self._held[agent])) is not None:
                return
        if everyone and len(here):
            lost = int(active[here].max())
            self._at[lost], self._held[lost] = self._kinds.lengths[self._kind[lost]], 0.0
            self.outcome.agents_lost += 1

    def _begin_anew(self, agent: int, held: float) -> float | None:
        """Kill an agent's call; it thinks, and begins it again, or does without it when that was
        the last try. Returns the bytes that it gives up. None: it has none."""
        if self._thinks_until[agent] > self._second:
            return None
        kind, at = self._kind[agent], int(self._at[agent])
        begins = int(self._kinds.begins[kind, at])
        if begins < 0:
            return None
        before = float(self._kinds.held[kind, begins - 1]) if begins else 0.0
        before = min(before, held)
        self.outcome.calls_killed += 1
        self._held[agent] = before
        self._thinks_until[agent] = self._second + THINK_S
        self._tries[agent] = 1 if at > self._reached[agent] else self._tries[agent] + 1
        self._reached[agent] = max(self._reached[agent], at)
        # A call that has begun before another one was given up is not begun before that again:
        # calls that overlap would be given up by turns, and the agent never come to an end.
        self._at[agent] = max(begins, int(self._given_up_to[agent]))
        if self._tries[agent] >= TRIES:
            self._give_up(agent, begins, at)
        return held - before

    def _give_up(self, agent: int, begins: int, at: int) -> None:
        """Have an agent do without a call, from the second `at` that it has come to."""
        self._tries[agent] = 0
        self.outcome.calls_given_up += 1
        kind = self._kind[agent]
        row, length = self._kinds.begins[kind], self._kinds.lengths[kind]
        while at < length and row[at] == begins:
            at += 1
        self._at[agent] = self._given_up_to[agent] = at

    def _tell_ended(self, agents: Indices, kind: Indices, at: Indices) -> None:
        """Tell the scheduler of calls that end with this second."""
        begins, lengths = self._kinds.begins, self._kinds.lengths
        now = begins[kind, at]
        after = np.minimum(at + 1, lengths[kind] - 1)
        ends = (now >= 0) & ((begins[kind, after] != now) | (at + 1 >= lengths[kind]))
        for index in np.flatnonzero(ends):
            row = self._kinds.held[kind[index], now[index] : at[index] + 1]
            base = self._kinds.held[kind[index], now[index] - 1] if now[index] else 0.0
            peak = max(0.0, float(row.max()) - float(base))
            self._placing.ended(int(self._node[agents[index]]), peak)


def simulate(kinds: Kinds, cluster: Cluster, placing: str, daemon: bool) -> Outcome:
    """Run a cluster to its end."""
    return Simulation(kinds, cluster, placing, daemon).run()
