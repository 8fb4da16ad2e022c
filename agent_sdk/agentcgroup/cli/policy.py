"""`policy`: what is done when memory runs short. Files are read by the daemon's package, which
knows their language; the policy in force is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentcgroup.errors import AgentcgError
from agentcgroup.types import Explanation, PolicyState

from . import common
from .output import (
    NONE,
    clock,
    duration,
    number,
    paint,
    print_fields,
    print_json,
    print_table,
    since,
)
from .trace import load

CONFIG = Path("/etc/agentcgroup/agentcgroupd.toml")
IN_FORCE = "the policy in force"


def add_commands(subparsers: common.Subparsers, chosen: tuple[str, ...]) -> None:
    """Add this module's commands. The arguments of `simulate` are asked for only if it was
    `chosen`: that imports the daemon's package."""
    summary = "Check, show, compare, simulate and reload policies; explain one's view of a call."
    parser = subparsers.add_parser("policy", help=summary, description=summary)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    file_help = "a TOML file, or the name of a policy that came with the daemon"
    check = common.command(
        commands, "check", _reading(run_check), "Say what is wrong with a policy."
    )
    check.add_argument("file", nargs="?", metavar="FILE",
                       help=f"{file_help}; else what the daemon's configuration says")  # fmt: skip
    check.add_argument("--pool", metavar="SIZE", help="warn of what a pool of this size makes odd")
    show = common.command(
        commands, "show", _reading(run_show),
        "Show the policy in force and how its rulesets stand (root), or that of a file.",
    )  # fmt: skip
    show.add_argument("file", nargs="?", metavar="FILE", help=file_help)
    show.add_argument("--toml", action="store_true", help="print the whole document")
    for command in (check, show):
        command.add_argument("--drop-in", metavar="DIR", help="with the drop-ins of this directory")
    diff = common.command(
        commands, "diff", _reading(run_diff), "Say key by key how two policies differ."
    )
    diff.add_argument("before", metavar="A", help=file_help)
    diff.add_argument("after", nargs="?", metavar="B", help="the same; else the policy in force")
    explain = common.command(
        commands, "explain", run_explain, "Say how the policy sees an open call (root)."
    )
    explain.add_argument("call", metavar="CALL", help="the call's id")
    simulate = common.command(
        commands, "simulate", run_simulate, "Simulate recorded agents, without a kernel."
    )
    if chosen == ("policy", "simulate"):
        load("agentcgroup_lab.simulate.cli").add_simulate_arguments(simulate)
    common.command(commands, "reload", run_reload, "Have the daemon read its policy anew (root).")


def _reading(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Says what is wrong with the files that `run` reads."""

    def wrapper(args: argparse.Namespace) -> int:
        if getattr(args, "drop_in", None) and not Path(args.drop_in).is_dir():
            print(f"agentcg: {args.drop_in}: there is no such directory", file=sys.stderr)
            return common.USAGE
        errors = load("agentcgroupd.errors")
        try:
            return run(args)
        except errors.InvalidField as error:
            print(f"agentcg: {error}", file=sys.stderr)
            return common.USAGE
        except errors.ConfigError as error:
            if args.json:
                details = [
                    {"file": m.file, "line": m.line or None, "key": m.key, "sentence": m.sentence}
                    for m in getattr(error, "errors", ())
                ]
                found = AgentcgError(str(error)).to_dict()
                print_json({"ok": False, "error": found, "mistakes": details})
            print(error, file=sys.stderr)
            return common.BAD

    return wrapper


def _load(file: str | None, drop_in: str | None, limit_bytes: int | None = None) -> Any:
    """A Loaded of the daemon's package."""
    read = load("agentcgroupd.policy.load").load_policy
    if file is not None:
        return read(Path(file), drop_in and Path(drop_in), limit_bytes)
    policy = load("agentcgroupd.config").load_config(CONFIG if CONFIG.exists() else None).policy
    return read(policy.path, Path(drop_in) if drop_in else policy.drop_in, limit_bytes)


def run_check(args: argparse.Namespace) -> int:
    """Whether a policy can be used."""
    parse_bytes = load("agentcgroupd.units").parse_bytes
    loaded = _load(args.file, args.drop_in, args.pool and parse_bytes("--pool", args.pool))
    sources = [str(source) for source in loaded.sources]
    if args.json:
        warnings = list(loaded.warnings)
        print_json({"ok": True, "name": loaded.policy.name, "sources": sources,
                    "warnings": warnings})  # fmt: skip
        return common.OK
    count = len(loaded.policy.rulesets)
    print(f"policy {loaded.policy.name}: {paint('ok', 'green')}, {count} rulesets, "
          f"from {' '.join(sources)}")  # fmt: skip
    for warning in loaded.warnings:
        print(f"{paint('warning', 'yellow')}: {warning}")
    return common.OK


def run_show(args: argparse.Namespace) -> int:
    """A policy and its rulesets."""
    if args.file is None and args.drop_in is None:
        with common.admin() as client:
            state = client.policy()
    else:
        state = _state(_load(args.file, args.drop_in))
    if args.json:
        print_json(state.to_dict())
    elif args.toml:
        print(state.document, end="")
    else:
        print_policy(state)
    return common.OK


def _state(loaded: Any) -> PolicyState:
    return PolicyState.from_proto(load("agentcgroupd.policy.explain").policy_state(loaded))


def print_policy(state: PolicyState) -> None:
    """For people: where it comes from, and each ruleset with its detectors."""
    in_force = bool(state.loaded_unix_usec)
    loaded = f"{since(state.loaded_unix_usec)} ago" if in_force else ""
    fields = [
        ("policy", state.name),
        ("from", " ".join(state.sources)),
        ("loaded", loaded),
        ("dry run", "nothing is done, only said" if state.dry_run else ""),
        ("wrong", paint(state.error.replace("\n", "\n       "), "red") if state.error else ""),
    ]
    print_fields([field for field in fields if field[1]])
    if not state.rulesets:
        return
    print()
    if in_force:
        _print_standing(state)
    for ruleset in state.rulesets:
        for detector in ruleset.detectors:
            print(f"{paint(ruleset.name, 'bold')} ({ruleset.action}): {detector}")


def _print_standing(state: PolicyState) -> None:
    rows = []
    for ruleset in state.rulesets:
        stands = "holds" if ruleset.holds else "does not hold"
        if ruleset.dry_run and not state.dry_run:
            stands += " (dry run)"
        ago = ruleset.acted_usec_ago
        last = NONE if ago is None else f"{duration(ago)} ago"
        rows.append([ruleset.name, ruleset.action, stands, number(ruleset.decisions), last])
    print_table(["RULESET", "ACTION", "STANDS", ">DECISIONS", ">LAST"], rows)
    print()


def run_diff(args: argparse.Namespace) -> int:
    """Two policies, key by key."""
    before = _load(args.before, None).policy
    if args.after is not None:
        after = _load(args.after, None).policy
    else:
        with common.admin() as client:
            document = client.policy().document
        after = load("agentcgroupd.policy.load").parse_policy(document, IN_FORCE)
    changes = load("agentcgroupd.policy.toml").diff(before, after)
    if args.json:
        print_json([{"key": c.key, "before": c.before, "after": c.after} for c in changes])
        return common.OK
    print(f"from {args.before} to {args.after or IN_FORCE}:")
    for change in changes:
        print(f"  {change}")
    if not changes:
        print("  no difference")
    return common.OK


def run_explain(args: argparse.Namespace) -> int:
    """One call under the policy."""
    with common.admin() as client:
        explanation = client.explain_call(args.call)
    if args.json:
        print_json(explanation.to_dict())
    else:
        print_explanation(explanation)
    return common.OK


def print_explanation(explanation: Explanation) -> None:
    """For people: the sentence, what was done, what would come."""
    print(explanation.sentence)
    if explanation.history:
        print(paint("so far", "bold"))
        for item in explanation.history:
            print(f"  {clock(item.at_unix_usec)}  {item.code}: {item.sentence}")
    if explanation.outlook:
        print(paint("next", "bold"))
        for sentence in explanation.outlook:
            print(f"  {sentence}")


def run_simulate(args: argparse.Namespace) -> int:
    """Recorded agents under a policy."""
    return int(load("agentcgroup_lab.simulate.cli").run_simulate(args))


def run_reload(args: argparse.Namespace) -> int:
    """Read the files anew."""
    with common.admin() as client:
        state = client.reload_policy()
    if args.json:
        print_json(state.to_dict())
    else:
        print(f"policy {state.name} in force, from {' '.join(state.sources)}")
    return common.OK
