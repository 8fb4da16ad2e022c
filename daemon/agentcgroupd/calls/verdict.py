"""Verdict and sentence of a call, from the evidence of how it ended: rules, of which the first that
applies decides. Pure.

An exit code alone never decides: 137 is what a shell returns for a child that someone killed as
much as for one that ran out of memory. docs/endings.md lists the rules.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.calls import delays
from agentcgroupd.calls.facts import EndFacts, LimitHit
from agentcgroupd.calls.feedback import feedback_of
from agentcgroupd.calls.words import (
    CALLER_SAYS,
    child_oom,
    claim_words,
    earlier_left_words,
    gone_words,
    left_words,
    limit_words,
    oom_advice,
    swept_words,
)
from agentcgroupd.state.ending import Asked, Asker
from agentcgroupd.units import show_usec


@dataclass(frozen=True, slots=True)
class Rule:
    """A way in which a call can end."""

    name: str
    """Words for it, those of docs/endings.md."""
    applies: Callable[[EndFacts], bool]
    verdict: pb.Verdict.ValueType
    sentence: Callable[[EndFacts], str]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# Out of memory


def _oom_at(*levels: pb.Level.ValueType) -> Callable[[EndFacts], bool]:
    def applies(facts: EndFacts) -> bool:
        hit = facts.oom_hit
        level = pb.LEVEL_HOST if hit is None else hit.level
        return facts.main_oom and level in levels

    return applies


def _oom(facts: EndFacts) -> str:
    hit = facts.oom_hit
    if hit is None:
        return (
            "Out of memory: the host itself ran out and the kernel chose this call; no limit of "
            "this call, its session or the pool was reached. Trying again later may help."
        )
    text = f"Out of memory: {limit_words(hit)}, and {_chosen(hit)}. {oom_advice(facts, hit)}"
    if facts.ender is not None and facts.ender.by is Asker.TIMEOUT:
        limit = show_usec(facts.grant.timeout_usec or 0)
        text += f" Its timeout of {limit} had passed before that."
    return text


def _oom_outside(facts: EndFacts) -> str:
    return (
        f"Out of memory outside of the call: the kernel ended it in {facts.left[-1].path}, the "
        "cgroup that it had left the call for."
    )


def _chosen(hit: LimitHit) -> str:
    if hit.level == pb.LEVEL_NESTED:
        return "the kernel ended the main process, which was in it"
    if hit.level == pb.LEVEL_CALL:
        return "the kernel ended it; nothing else was touched"
    return "the kernel chose this call"


# Ended by somebody


def _by(asker: Asker) -> Callable[[EndFacts], bool]:
    return lambda facts: facts.ender is not None and facts.ender.by is asker


def _timeout(facts: EndFacts) -> str:
    limit = show_usec(facts.grant.timeout_usec or 0)
    if facts.ender is not None and facts.ender.why:
        limit = f"{limit}, {facts.ender.why}"
    return (
        f"The call was ended at its timeout of {limit}. Ask for a longer timeout, or for less "
        "work at a time."
    )


def _cancelled(facts: EndFacts) -> str:
    assert facts.ender is not None
    return f"The call was ended while running: {_who(facts.ender)}."


def _who(asked: Asked) -> str:
    if asked.by is Asker.OPERATOR:
        return "the operator ended the call"
    if asked.by is Asker.OUTER:
        return asked.why
    if asked.by is Asker.TOOL:
        return CALLER_SAYS.get(asked.reason, asked.why)
    if asked.by is Asker.SESSION:
        return "its session was closed"
    return CALLER_SAYS.get(asked.reason, "its agent ended the call")


def _policy(facts: EndFacts) -> str:
    assert facts.ender is not None
    return facts.ender.why


def _went_on(facts: EndFacts) -> str:
    assert facts.went_on is not None
    return facts.went_on.why


# Ended by itself


def _no_oom(facts: EndFacts) -> str:
    since = " since this command began" if facts.oom.kills_before else ""
    return f"memory.events counts no OOM kill{since}"


def _sigkill(facts: EndFacts) -> str:
    if facts.outside:
        return (
            "It was killed with SIGKILL outside of its call, by whom is not known: itself, its "
            "caller, another process, a limit such as RLIMIT_CPU, or whoever ended what was in "
            "that cgroup. What the kernel counts in the call says nothing of what happened there."
        )
    if facts.outside is None:
        return (
            "It was killed with SIGKILL, by whom is not known: it was then in a cgroup that has "
            "been removed since, and perhaps with what was in it."
        )
    if facts.oom_kills is None:
        proof = "whether the kernel ran out of memory cannot be seen on this host"
    elif facts.oom.kills:
        proof = "the kernel's OOM killer chose other processes of the call"
    else:
        proof = _no_oom(facts)
    return (
        "It was killed with SIGKILL, by whom is not known: itself, its caller, another process or "
        f"a limit such as RLIMIT_CPU. It was not the daemon, and {proof}."
    )


_NOT_RUN = {
    126: ", by which a shell or a launcher says that a program could not be run",
    127: ", by which a shell or a launcher says that a program is not there",
}


def _failed(facts: EndFacts) -> str:
    code = facts.exit_code
    if facts.oom.kills:
        return f"It ended with exit status {code}."
    if code == 128 + signal.SIGKILL and facts.oom_kills is not None:
        return (
            "It ended with exit status 137, which a shell gives for a child that was killed; "
            f"{_no_oom(facts)}."
        )
    meaning = _NOT_RUN.get(code or 0, "")
    if any(hit.level in (pb.LEVEL_NESTED, pb.LEVEL_CALL) for hit in facts.pids_hits):
        return (
            f"It ended with exit status {code}{meaning}; it had been refused a process or thread."
        )
    return f"It ended with exit status {code}{meaning}; no limit of agentcgroup ended it."


def _unknown(facts: EndFacts) -> str:
    if facts.main_lives:
        reason = "its main process does not die of SIGKILL"
    elif facts.removed:
        reason = "its cgroup was removed by someone else"
    elif facts.main_lost:
        reason = "its main process ended while the daemon was not there to see it"
    elif not facts.commands:
        reason = (
            "none of its processes was known as its main process, as one is that enters through "
            "agentcg-exec"
        )
    else:
        reason = "its main process was gone before the kernel could be asked for its status"
    return f"It ended, and how is not known: {reason}."


NEVER_ENTERED = (
    "No process ever entered the call. Start the tool through agentcg-exec or call.run()."
)


def _never_started(facts: EndFacts) -> str:
    return (
        "No process ever entered the call: its caller says that the command could not be started "
        f"(exit status {facts.exit_code}). The error that the caller got says why, such as "
        "arguments longer than the kernel takes (hand them over in a file or on standard input), "
        "or a directory to start in that is not there."
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "nobody entered, and its caller says that the command could not be started",
        lambda f: not f.ever_entered and bool(f.exit_code),
        pb.VERDICT_ABANDONED,
        _never_started,
    ),
    Rule(
        "its timeout passed before anybody entered",
        lambda f: not f.ever_entered and any(a.by is Asker.TIMEOUT for a in f.asked),
        pb.VERDICT_TIMEOUT,
        _timeout,
    ),
    Rule(
        "nobody entered",
        lambda f: not f.ever_entered,
        pb.VERDICT_ABANDONED,
        lambda f: NEVER_ENTERED,
    ),
    Rule(
        "went on as another call",
        lambda f: f.went_on is not None,
        pb.VERDICT_OK,
        _went_on,
    ),
    Rule(
        "main process out of memory at the call's limit, or at one below or between calls",
        _oom_at(pb.LEVEL_NESTED, pb.LEVEL_CALL, pb.LEVEL_OUTER),
        pb.VERDICT_OOM_CALL,
        _oom,
    ),
    Rule(
        "main process out of memory at the session's limit",
        _oom_at(pb.LEVEL_SESSION),
        pb.VERDICT_OOM_SESSION,
        _oom,
    ),
    Rule(
        "main process out of memory at the pool's limit",
        _oom_at(pb.LEVEL_POOL),
        pb.VERDICT_OOM_POOL,
        _oom,
    ),
    Rule(
        "main process out of memory above the session and the pool",
        _oom_at(pb.LEVEL_HOST),
        pb.VERDICT_OOM_HOST,
        _oom,
    ),
    Rule(
        "main process out of memory in a cgroup that it had left for",
        lambda f: f.oom_outside,
        pb.VERDICT_OOM_HOST,
        _oom_outside,
    ),
    Rule("its timeout passed", _by(Asker.TIMEOUT), pb.VERDICT_TIMEOUT, _timeout),
    Rule("ended by policy", _by(Asker.POLICY), pb.VERDICT_STOPPED, _policy),
    Rule(
        "ended by its agent, a tool, the operator, or with its session or the call it is in",
        lambda f: f.ender is not None,
        pb.VERDICT_CANCELLED,
        _cancelled,
    ),
    Rule("died of SIGKILL", lambda f: f.signal == signal.SIGKILL, pb.VERDICT_SIGNALED, _sigkill),
    Rule(
        "died of another signal",
        lambda f: f.signal is not None,
        pb.VERDICT_SIGNALED,
        lambda f: f"It died of {_signal_name(f.signal or 0)}.",
    ),
    Rule("exit status 0", lambda f: f.exit_code == 0, pb.VERDICT_OK, lambda f: "It ended well."),
    Rule("another exit status", lambda f: f.exit_code is not None, pb.VERDICT_FAILED, _failed),
    Rule("nobody saw", lambda f: True, pb.VERDICT_UNKNOWN, _unknown),
)
"""In the order in which they are asked."""


def rule_of(facts: EndFacts) -> Rule:
    """The rule that decides on a verdict."""
    return next(rule for rule in RULES if rule.applies(facts))


def judge(facts: EndFacts) -> tuple[pb.Verdict.ValueType, str]:
    """Decide on the verdict, and say it in one plain sentence, followed by what else an agent has
    to know to understand it."""
    rule = rule_of(facts)
    said = [rule.sentence(facts)]
    if facts.ever_entered:
        said += [child_oom(facts), left_words(facts), gone_words(facts)]
        said.append(swept_words(facts))
        said.append(claim_words(facts))
        said += earlier_left_words(facts)
    return rule.verdict, " ".join(filter(None, said))


def report_of(facts: EndFacts) -> pb.Report:
    """Make a report from facts: all of it but the names of call and session and the grant."""
    verdict, sentence = judge(facts)
    report = pb.Report(
        verdict=verdict,
        sentence=sentence + delays.told(facts.delays, facts.wall_usec),
        evidence=facts.evidence,
        wall_usec=facts.wall_usec,
        memory_peak_bytes=facts.memory_peak_bytes,
        cpu_usage_usec=facts.cpu.get("usage_usec", 0),
        cpu_user_usec=facts.cpu.get("user_usec", 0),
        cpu_system_usec=facts.cpu.get("system_usec", 0),
        cpu_throttled_usec=facts.cpu.get("throttled_usec"),
        pids_peak=facts.pids_peak,
        io_read_bytes=facts.io_read_bytes,
        io_write_bytes=facts.io_write_bytes,
        memory_throttled_usec=facts.memory_throttled_usec,
        memory_high_events=facts.memory_high_events,
        oom_kills=facts.oom_kills,
        pids_max_events=facts.pids_max_events,
        frozen_usec=facts.frozen_usec,
        delays=facts.delays,
        devices=facts.devices,
        feedback=feedback_of(facts, verdict, sentence),
    )
    if facts.wait_status is not None:
        if os.WIFSIGNALED(facts.wait_status):
            report.term_signal = os.WTERMSIG(facts.wait_status)
        else:
            report.exit_code = os.WEXITSTATUS(facts.wait_status)
    return report
