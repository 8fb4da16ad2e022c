"""How things stand under the policy, in words."""

from __future__ import annotations

import pytest

from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroupd.policy.explain import explain, policy_state
from agentcgroupd.policy.load import Loaded, load_policy
from agentcgroupd.policy.snapshot import CallView, Host, RuleState, Snapshot, State

GIB, MIB = 1 << 30, 1 << 20
DEFAULT = load_policy(None)
POLICY = DEFAULT.policy


def call(id: str, growth_mib: int = 0, **values: object) -> CallView:
    """A call of 300 MiB that began after those before it in the alphabet."""
    given = {"priority": 50, "memory_bytes": 300 * MIB, **values}
    return CallView(
        id=id,
        name=f"tool-{id}",
        session_id="s",
        began_usec=ord(id),
        cpu_usec=1,
        growth_bytes_per_s=growth_mib * MIB,
        **given,  # type: ignore[arg-type]
    )


def snapshot(free_bytes: int, *calls: CallView, **host: object) -> Snapshot:
    """A snapshot of a pool of 8 GiB."""
    return Snapshot(
        now_usec=60_000_000,
        limit_bytes=8 * GIB,
        usage_bytes=8 * GIB - free_bytes,
        growth_bytes_per_s=sum(c.growth_bytes_per_s for c in calls),
        calls=calls,
        host=Host(**host),  # type: ignore[arg-type]
    )


def test_what_comes_next_and_when() -> None:
    now = snapshot(3 * GIB, call("a", 50, priority=60), call("b", 20), swap_free_bytes=GIB)
    found = explain(POLICY, now, State(), "b")
    assert "'tool-b' runs with 300 MiB, growing by 20 MiB a second (priority 50)" in found.sentence
    assert "'tool-a' of session s goes first, which is more important" in found.sentence
    rulesets = ["throttle", "freeze", "freeze-fast", "kill", "kill-stalled"]
    assert [line.split(":")[0] for line in found.outlook] == rulesets
    # 4 % of 8 GiB are kept, and what the leader has not yet of 2 GiB; 3 GiB go at 70 MiB a second.
    left_s = (3 * 1024 - 0.04 * 8192 - (2048 - 300)) / 70
    assert f"in {left_s:.3g} s as the pool grows now" in found.outlook[1]
    assert found.numbers["pool_free_bytes"] == 3 * GIB
    assert found.numbers["leader_room_bytes"] == 1748 * MIB
    assert "frozen_for_usec" not in found.numbers


def test_the_leader_is_left_alone() -> None:
    now = snapshot(300 * MIB, call("a", 50), call("b", 20))
    found = explain(POLICY, now, State(), "a")
    assert "it leads" in found.sentence
    assert list(found.outlook) == ["no ruleset would do anything to it as things are"]


@pytest.mark.parametrize(
    ("host", "on_pressure", "rulesets"),
    [
        ({}, "freeze", ["freeze", "freeze-fast", "kill", "kill-stalled"]),
        (
            {"swap_free_bytes": GIB},
            "freeze",
            ["throttle", "freeze", "freeze-fast", "kill", "kill-stalled"],
        ),
        (
            {"can_penalize": True},
            "freeze",
            ["throttle", "freeze", "freeze-fast", "kill", "kill-stalled"],
        ),
        (
            {"can_deny": True},
            "deny",
            ["deny", "freeze", "deny-fast", "freeze-fast", "kill", "kill-stalled"],
        ),
        ({"can_deny": True}, "freeze", ["freeze", "freeze-fast", "kill", "kill-stalled"]),
    ],
)
def test_only_rulesets_that_could_touch_it(
    host: dict[str, object], on_pressure: str, rulesets: list[str]
) -> None:
    now = snapshot(300 * MIB, call("a", 50), call("b", 20, on_pressure=on_pressure), **host)
    found = explain(POLICY, now, State(), "b")
    assert [line.split(":")[0] for line in found.outlook] == rulesets
    assert found.outlook[0].endswith("that is so now")


def test_important_calls_are_spared() -> None:
    now = snapshot(
        300 * MIB, call("a", 50, priority=90), call("b", 20, priority=80), swap_free_bytes=GIB
    )
    found = explain(POLICY, now, State(), "b")
    assert not any(line.startswith("throttle") for line in found.outlook)


def test_what_the_operator_holds_is_told_as_held() -> None:
    found = explain(POLICY, snapshot(600 * MIB, call("a")), State(), "a", held="a")
    assert "'tool-a' is held paused by the operator, with " in found.sentence
    assert found.outlook == ["it goes on after 'agentcg resume a', whatever the policy decides"]


def test_the_way_back_of_a_paused_call() -> None:
    paused = [call(id, frozen_for_usec=3_000_000) for id in "bc"]
    now = snapshot(600 * MIB, call("a"), *paused)
    told = [pb.Feedback(code=pb.FEEDBACK_CODE_FROZEN, sentence="Paused.")]
    found = explain(POLICY, now, State(), "c", told)
    assert "has been paused for 3 s with 300 MiB" in found.sentence
    assert list(found.history) == told
    enough = "it goes on when 2.187 GiB of the pool are free, or when nothing else runs"
    assert found.outlook[0] == enough
    assert "in 1 min 57 s at the latest" in found.outlook[1]
    assert found.outlook[2] == "1 paused call goes on before it"
    assert found.outlook[3].startswith("kill: ")


def test_a_call_that_is_not_there() -> None:
    with pytest.raises(KeyError):
        explain(POLICY, snapshot(GIB), State(), "b")


def test_how_rulesets_stand() -> None:
    now = snapshot(2150 * MIB, call("a"), call("b", 20, priority=20))
    holding = {"freeze": RuleState((True,), acted_usec=58_000_000, decisions=3)}
    found = policy_state(DEFAULT, "wrong", 5, now, State(holding))
    states = {r.name: r for r in found.rulesets}
    # It has held before, and 6 % beside the room are not free yet; deny has not held.
    assert states["freeze"].holds and not states["deny"].holds
    assert (states["freeze"].decisions, states["freeze"].acted_usec_ago) == (3, 2_000_000)
    assert not states["deny"].HasField("acted_usec_ago")
    freeze = "pool_free: 2.1 GiB of 8 GiB (26.2%) free, of which 1.707 GiB are room kept; holds"
    assert states["freeze"].detectors[0].startswith(freeze)
    kill = "pool_fills: full in 1 min 48 s as it grows now; not"
    assert states["kill"].detectors[1].startswith(kill)
    assert (found.error, found.loaded_unix_usec, found.dry_run) == ("wrong", 5, False)


def test_without_numbers_only_what_is_looked_for() -> None:
    disabled = POLICY.rulesets[0].model_copy(update={"enabled": False})
    policy = POLICY.model_copy(
        update={"rulesets": (disabled, *POLICY.rulesets[1:]), "dry_run": True}
    )
    found = policy_state(Loaded(policy, (), ""))
    assert found.rulesets[0].detectors[0] == "disabled: it is not tried"
    assert found.rulesets[1].detectors[0] == "pool_free: less than 25% free, until 30%"
    assert all(r.dry_run and not r.holds for r in found.rulesets)
