"""`policy`: what is done when memory runs short.

Files are read by the daemon's package, which knows their language. The daemon is asked for the
policy in force.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentcgroup.errors import AgentcgError, PermissionDenied, Unavailable
from agentcgroup.types import Explanation, PolicyState

from . import common, summaries
from .config import CONFIG
from .output import (
    NONE,
    clock,
    complain,
    duration,
    number,
    paint,
    print_fields,
    print_json,
    print_table,
    say,
    since,
)
from .trace import load

IN_FORCE = "the policy in force"


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's commands.

    The arguments of `simulate` are asked for only where it is, because that imports another
    package.
    """
    commands = common.group(subparsers, "policy", summaries.summary("policy"))

    file_help = "a TOML file, or the name of a policy that came with the daemon"
    else_help = f"{file_help}; else what the daemon's configuration says"
    pool_help = "warn of settings that make no sense for a pool of this size"
    summary = "Say what is wrong with a policy."
    check = common.command(commands, "check", _reading(run_check), summary)
    check.add_argument("file", nargs="?", metavar="FILE", help=else_help)
    check.add_argument("--pool", metavar="SIZE", help=pool_help)
    summary = "Show the policy in force and how its rulesets stand (root), or that of a file."
    show = common.command(commands, "show", _reading(run_show), summary)
    show.add_argument("file", nargs="?", metavar="FILE", help=file_help)
    show.add_argument("--toml", action="store_true", help="print the whole document")
    for command in (check, show):
        command.add_argument("--drop-in", metavar="DIR", help="with the drop-ins of this directory")
    summary = "Say key by key how two policies differ."
    diff = common.command(commands, "diff", _reading(run_diff), summary)
    diff.add_argument("before", metavar="A", help=file_help)
    diff.add_argument("after", nargs="?", metavar="B", help="the same; else the policy in force")
    summary = "Say how the policy sees an open call (root)."
    explain = common.command(commands, "explain", run_explain, summary)
    explain.add_argument("call", metavar="CALL", help="the call's id")
    summary = "Simulate recorded agents, without a kernel."
    simulate = common.command(commands, "simulate", run_simulate, summary)
    if words is None or words == ("policy", "simulate"):
        load("agentcgroup_lab.simulate.cli").add_simulate_arguments(simulate)
    common.command(commands, "reload", run_reload, "Have the daemon read its policy anew (root).")


def _reading(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Wrap `run` so that mistakes in the files that it reads are said, file and line."""

    def wrapper(args: argparse.Namespace) -> int:
        if getattr(args, "drop_in", None) and not Path(args.drop_in).is_dir():
            complain(f"agentcg: {args.drop_in}: there is no such directory")
            return common.USAGE
        errors = load("agentcgroupd.errors")
        try:
            return run(args)
        except errors.InvalidField as error:
            complain(f"agentcg: {error}")
            return common.USAGE
        except errors.ConfigError as error:
            if args.json:
                details = [
                    {"file": m.file, "line": m.line or None, "key": m.key, "sentence": m.sentence}
                    for m in getattr(error, "errors", ())
                ]
                found = AgentcgError(str(error)).to_dict()
                print_json({"ok": False, "error": found, "mistakes": details})
            complain(error)
            return common.BAD

    return wrapper


def _load(file: str | None, drop_in: str | None, limit_bytes: int | None = None) -> Any:
    """Read a policy, else that of the daemon's configuration; returns a policy.load.Loaded."""
    read = load("agentcgroupd.policy.load").load_policy
    if file is not None:
        return read(Path(file), drop_in and Path(drop_in), limit_bytes)
    policy = load("agentcgroupd.config").load_config(CONFIG if CONFIG.exists() else None).policy
    return read(policy.path, Path(drop_in) if drop_in else policy.drop_in, limit_bytes)


def run_check(args: argparse.Namespace) -> int:
    """Print whether a policy can be used; returns the exit code, as every `run_` function."""
    parse_bytes = load("agentcgroupd.units").parse_bytes
    loaded = _load(args.file, args.drop_in, args.pool and parse_bytes("--pool", args.pool))
    sources = [str(source) for source in loaded.sources]
    if args.file is None and args.drop_in is None and (wrong := _wrong_in_daemon()):
        return _say_wrong(args, wrong)
    if args.json:
        found = {"ok": True, "name": loaded.policy.name, "sources": sources}
        print_json({**found, "warnings": list(loaded.warnings)})
        return common.OK
    ok, count = paint("ok", "green"), len(loaded.policy.rulesets)
    say(f"policy {loaded.policy.name}: {ok}, {count} rulesets, from {' '.join(sources)}")
    for warning in loaded.warnings:
        say(f"{paint('warning', 'yellow')}: {warning}")
    if args.file is not None and args.drop_in is None:
        _say_left_out(args.file)
    return common.OK


def _wrong_in_daemon() -> str:
    """Return what the running daemon finds wrong with the files that it reads, which may be others
    than the configuration names by now; empty where no daemon answers, or not to this user."""
    try:
        with common.admin() as client:
            return client.policy().error
    except (Unavailable, PermissionDenied):
        return ""


def _say_wrong(args: argparse.Namespace, wrong: str) -> int:
    text = f"the running daemon cannot use its files, and goes by those before: {wrong}"
    if args.json:
        print_json({"ok": False, "error": AgentcgError(text).to_dict(), "mistakes": []})
    complain(f"agentcg: {text}")
    return common.BAD


def _say_left_out(file: str) -> None:
    """Say which drop-ins the daemon would lay over a file, though they were not looked at. Of a
    configuration that cannot be read nothing is said: nobody asked for it."""
    try:
        config = load("agentcgroupd.config").load_config(CONFIG if CONFIG.exists() else None)
    except load("agentcgroupd.errors").ConfigError:
        return
    drop_in = config.policy.drop_in
    if drop_in is not None and any(Path(drop_in).glob("*.toml")):
        say(f"{file} alone; with what is in {drop_in}: --drop-in {drop_in}")


def run_show(args: argparse.Namespace) -> int:
    """Print a policy and its rulesets."""
    if args.file is None and args.drop_in is None:
        with common.admin() as client:
            state = client.policy()
    else:
        state = _state(_load(args.file, args.drop_in))
    if args.json:
        print_json(state.to_dict())
    elif args.toml:
        say(state.document, end="")
    else:
        print_policy(state)
    return common.OK


def _state(loaded: Any) -> PolicyState:
    return PolicyState.from_proto(load("agentcgroupd.policy.explain").policy_state(loaded))


def print_policy(state: PolicyState) -> None:
    """Print for people where a policy comes from, and each ruleset with its detectors."""
    in_force = bool(state.loaded_unix_usec)
    loaded = f"{since(state.loaded_unix_usec)} ago" if in_force else ""
    fields = [
        ("policy", state.name),
        ("from", " ".join(state.sources)),
        ("loaded", loaded),
        ("dry run", "nothing is done, only said" if state.dry_run else ""),
        ("wrong", paint(state.error, "red") if state.error else ""),
    ]
    print_fields([field for field in fields if field[1]])
    if not state.rulesets:
        return
    say()
    if in_force:
        _print_standing(state)
    for ruleset in state.rulesets:
        for detector in ruleset.detectors:
            say(f"{paint(ruleset.name, 'bold')} ({ruleset.action}): {detector}")


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
    say()


def run_diff(args: argparse.Namespace) -> int:
    """Print how two policies differ, key by key."""
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
    say(f"from {args.before} to {args.after or IN_FORCE}:")
    for change in changes:
        say(f"  {change}")
    if not changes:
        say("  no difference")
    return common.OK


def run_explain(args: argparse.Namespace) -> int:
    """Print how the policy sees a call."""
    with common.admin() as client:
        explanation = client.explain_call(args.call)
    if args.json:
        print_json(explanation.to_dict())
    else:
        print_explanation(explanation)
    return common.OK


def print_explanation(explanation: Explanation) -> None:
    """Print for people the sentence, what was done, and what would come next."""
    say(explanation.sentence)
    if explanation.history:
        say(paint("so far", "bold"))
        for item in explanation.history:
            say(f"  {clock(item.at_unix_usec)}  {item.code}: {item.sentence}")
    if explanation.outlook:
        say(paint("next", "bold"))
        for sentence in explanation.outlook:
            say(f"  {sentence}")


def run_simulate(args: argparse.Namespace) -> int:
    """Simulate recorded agents under a policy."""
    return int(load("agentcgroup_lab.simulate.cli").run_simulate(args))


def run_reload(args: argparse.Namespace) -> int:
    """Have the daemon read the policy's files anew."""
    with common.admin() as client:
        state = client.reload_policy()
    if args.json:
        print_json(state.to_dict())
    else:
        say(f"policy {state.name} in force, from {' '.join(state.sources)}")
    return common.OK
