"""Words for what happened at the end of a call, shared by verdicts and feedback. Pure."""

from __future__ import annotations

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls.facts import CALLER_REASONS, EndFacts, LimitHit
from agentcgroupd.state.ending import CALLER_WORDS, Asker, Gone, Held, Left
from agentcgroupd.units import show_bytes, show_usec

CALLER_SAYS = {reason: f"its caller says that {CALLER_WORDS[reason]}" for reason in CALLER_REASONS}
_MATTERS_BYTES = 1 << 20
"""Less than this held by an agent or in files is not worth a word."""


def count_of(number: int) -> str:
    """A number of processes in words."""
    return "1 process" if number == 1 else f"{number} processes"


def at_least(least: int, most: int) -> str:
    """A number of processes in words of which it is not quite known how many they were."""
    return count_of(most) if least == most else f"at least {count_of(least)}"


def _bytes_of(hit: LimitHit) -> str:
    return "" if hit.limit is None else f" of {show_bytes(hit.limit)}"


def limit_words(hit: LimitHit) -> str:
    """A clause that says which limit of memory was reached."""
    size = _bytes_of(hit)
    match hit.level:
        case pb.LEVEL_NESTED if hit.name.startswith("call-"):
            name = hit.name.rpartition("/")[2].removeprefix("call-")
            return f"call {name}, which was begun in this one, reached its limit{size}"
        case pb.LEVEL_NESTED:
            what = f"the cgroup {hit.name!r}" if hit.name else "a cgroup, gone since,"
            return f"{what} that the tool made below its call reached its own limit{size}"
        case pb.LEVEL_CALL:
            return f"the call reached its own limit{size}"
        case pb.LEVEL_OUTER:
            return f"call {hit.name}, which this one is in, reached its limit{size}"
        case pb.LEVEL_SESSION:
            return f"all of this session together reached its limit{size}"
        case pb.LEVEL_POOL:
            return f"all sessions together reached the pool's limit{size}"
        case _:
            return f"the cgroup {hit.name!r} above this session reached its limit{size}"


def oom_advice(facts: EndFacts, hit: LimitHit) -> str:
    """What holds the memory, where more than the call does, and what to do about it."""
    said = []
    swap = facts.oom.swap
    if swap is not None:
        said.append(f"Swapping it out was refused: {_swap_words(swap)}.")
    match hit.level:
        case pb.LEVEL_NESTED:
            said.append("Raise the limit that the tool set, or work in smaller parts.")
        case pb.LEVEL_CALL:
            said.append("Ask for a larger memory_max, or work in smaller parts.")
        case pb.LEVEL_OUTER:
            said.append("Ask for a larger memory_max of that call, or do less in it at a time.")
        case pb.LEVEL_SESSION:
            said.append(_session_advice(facts))
        case pb.LEVEL_POOL:
            said.append("It may go through when tried again in a while.")
        case _:
            said.append(
                "Others below that cgroup may have taken the memory: trying again later may help. "
                "If not, its limit is too low for this work."
            )
    return " ".join(said)


def _swap_words(swap: LimitHit) -> str:
    whose = {
        pb.LEVEL_CALL: "the call",
        pb.LEVEL_OUTER: f"call {swap.name}, which it is in,",
        pb.LEVEL_SESSION: "its session",
        pb.LEVEL_POOL: "the pool",
    }.get(swap.level, f"the cgroup {swap.name!r}")
    if not swap.limit:
        return f"{whose} may have no swap"
    return f"{whose} had all the swap that it may have ({show_bytes(swap.limit)})"


def _session_advice(facts: EndFacts) -> str:
    fewer = "Run fewer calls at a time, or with a smaller memory_max."
    held = facts.oom.held
    if held is None:
        return fewer
    parts, advice = [], []
    if facts.memory_peak_bytes is not None:
        parts.append(f"this call had {show_bytes(facts.memory_peak_bytes)} at most")
    if held.agent_bytes >= _MATTERS_BYTES:
        parts.append(f"the agent itself holds {show_bytes(held.agent_bytes)}")
    if held.files_bytes >= _MATTERS_BYTES:
        size = show_bytes(held.files_bytes)
        parts.append(f"files in tmpfs or /dev/shm whose call has ended hold {size}")
        advice.append("remove such files")
    if held.calls_bytes >= _MATTERS_BYTES:
        parts.append(f"its other calls hold {show_bytes(held.calls_bytes)}")
    if _mostly_agent(held, facts.memory_peak_bytes or 0):
        advice.append("let the agent hold less")
    told = f"Of that, {_listed(parts)}." if parts else ""
    if not advice:
        return f"{told} {fewer}".strip()
    text = " or ".join(advice)
    return f"{told} {text[0].upper()}{text[1:]}, or ask the operator for a larger session."


def _listed(parts: list[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _mostly_agent(held: Held, call_bytes: int) -> bool:
    return held.agent_bytes > max(held.calls_bytes + call_bytes, _MATTERS_BYTES)


def child_oom(facts: EndFacts) -> str:
    """What the kernel's OOM killer did to others of the call than its main process; empty:
    nothing."""
    oom = facts.oom
    if not oom.kills or facts.main_oom:
        return ""
    hit = facts.oom_hit
    where = "the host itself ran out of memory" if hit is None else limit_words(hit)
    who = f"{at_least(oom.least, oom.kills)} of the call"
    if facts.wait_status is not None:
        who += ", not its main process"
    return f"The kernel's OOM killer ended {who}: {where}."


def earlier_oom(facts: EndFacts) -> str:
    """What it did while earlier commands ran in the call; empty: nothing."""
    if not facts.oom.kills_before:
        return ""
    count = at_least(facts.oom.least_before, facts.oom.kills_before)
    before = "before its last command was started in it"
    where = "".join(f": {limit_words(hit)}" for hit in facts.oom.hits_before[:1])
    return f"The kernel's OOM killer ended {count} of this call {before}{where}."


def left_words(facts: EndFacts) -> str:
    """Where the main process went, if it left the call; empty: it did not."""
    if not facts.left:
        return ""
    return left_words_of(facts.left[-1], still_there=facts.main_lives)


def earlier_left_words(facts: EndFacts) -> list[str]:
    """Where the main processes of earlier commands went that left, and what became of them."""
    return [
        f"The main process ({left.pid}) of an earlier command left the call's cgroup for "
        f"{left.path}" + (" and was ended with the call." if left.pid in facts.left_lives else ".")
        for left in facts.left_before
    ]


def outside_words(facts: EndFacts) -> str:
    """What was ended outside of the call with it; empty: nothing."""
    count = 0 if facts.ender is None else facts.ender.outside
    if not count:
        return ""
    was = "was" if count == 1 else "were"
    return (
        f"{count_of(count)} that its main process had started and that had left the call's cgroup "
        f"{was} ended with it."
    )


def left_words_of(left: Left, still_there: bool) -> str:
    """Where a main process went. `still_there`: whether it runs there now."""
    text = f"Its main process ({left.pid}) left the call's cgroup for {left.path}"
    if left.moved_back:
        return f"{text}, where the call's limits do not hold, and was moved back."
    if still_there:
        return f"{text} and runs on without the call's limits; only its timeout holds there."
    return f"{text} and ran on without the call's limits until its end."


def gone_words(facts: EndFacts) -> str:
    """What left the call besides its main process, and who moved it; empty: nothing did, as far as
    the kernel told."""
    before = ""
    if facts.gone_before:
        left = f"{count_of(facts.gone_before)} left the call's cgroup"
        before = f"{left} while earlier commands ran in it."
    if not facts.gone_count:
        return before
    named = "; ".join(gone_words_of(gone) for gone in facts.gone)
    more = facts.gone_count - len(facts.gone)
    rest = f"; and {more} more" if more else ""
    least = "at least " if facts.gone_more else ""
    left = f"{least}{count_of(facts.gone_count)} left the call's cgroup".capitalize()
    now = f"{left}, where its limits do not hold: {named}{rest}."
    return f"{now} {before}".rstrip()


def gone_words_of(gone: Gone) -> str:
    """Say who moved a process out of its call, and where to, in a clause."""
    which = f"{gone.name} ({gone.pid})"
    if gone.mover_pid == gone.pid:
        return f"{which} moved itself to {gone.path}"
    return f"{which} was moved by {gone.mover} ({gone.mover_pid}) to {gone.path}"


def swept_words(facts: EndFacts) -> str:
    """What was ended of what the main process had left running; empty: nothing."""
    sweeper, left = facts.sweeper, facts.leftovers
    if sweeper is None:
        return ""
    what = f"{count_of(left)} that it had left running {'was' if left == 1 else 'were'} ended"
    match sweeper.by:
        case Asker.TIMEOUT:
            limit = show_usec(facts.grant.timeout_usec or 0)
            return f"At the call's timeout of {limit}, {what}."
        case Asker.POLICY:
            return f"Afterwards {what} by the policy: {sweeper.why}"
        case Asker.OPERATOR:
            return f"Afterwards {what} by the operator."
        case Asker.SESSION:
            return f"Afterwards {what} with its session."
        case Asker.OUTER:
            return f"Afterwards {what}: {sweeper.why}."
        case Asker.LEFTOVERS:
            return f"Afterwards {what}."
        case _ if sweeper.reason in CALLER_SAYS:
            return f"Afterwards {what}: {CALLER_SAYS[sweeper.reason]}."
        case Asker.TOOL:
            return f"Afterwards {what}: {sweeper.why}."
        case _:
            return ""


def claim_words(facts: EndFacts) -> str:
    """What the caller said when it ended the call after the main process had died of a signal, if
    that is not said of what was left running; empty: nothing."""
    if facts.claim is None or facts.sweeper is facts.claim:
        return ""
    return f"The call was ended afterwards: {CALLER_SAYS[facts.claim.reason]}."
