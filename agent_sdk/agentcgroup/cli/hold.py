"""`pause`, `resume`: calls that the operator stops for a while."""

from __future__ import annotations

import argparse

from . import common
from .output import print_json, say
from .summaries import summary


def add_commands(subparsers: common.Subparsers, words: common.Words) -> None:
    """Add this module's commands."""
    pause = common.command(subparsers, "pause", run_pause, summary("pause"))
    pause.add_argument("call", metavar="CALL", help="the call's id")
    pause.add_argument("--why", default="", metavar="TEXT", help="what its agent is told")
    resume = common.command(subparsers, "resume", run_resume, summary("resume"))
    resume.add_argument("call", metavar="CALL", help="the call's id")


def run_pause(args: argparse.Namespace) -> int:
    """Pause a call; returns the exit code, as every `run_` function."""
    with common.admin() as client:
        call = client.pause_call(args.call, args.why)
    if args.json:
        print_json(call.to_dict())
    else:
        say(f"call {call.id} ({call.name} of {call.session_id}) is paused until 'agentcg resume'")
    return common.OK


def run_resume(args: argparse.Namespace) -> int:
    """Let a call go on."""
    with common.admin() as client:
        call = client.resume_call(args.call)
    if args.json:
        print_json(call.to_dict())
    else:
        say(f"call {call.id} ({call.name} of {call.session_id}) goes on")
    return common.OK
