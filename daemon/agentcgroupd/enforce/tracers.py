"""Killed processes that a tracer keeps at their exit.

A tracer may ask to be told before a process exits (PTRACE_O_TRACEEXIT). One that was killed then
stops with all of its memory, and no signal moves it any more, until its tracer lets go of it or
ends (kernel/signal.c: prepare_signal drops signals to a process that is exiting). So whoever traces
a call's processes could keep the call from ending.
"""

from __future__ import annotations

import logging
import os
import signal

from agentcgroupd.errors import KnobError
from agentcgroupd.host.proc import CgroupUnknown, cgroup_of, program_name, tracer_of
from agentcgroupd.state.process import Process
from agentcgroupd.state.session import Call, Session, unix_usec

log = logging.getLogger(__name__)

PIDS_MOST = 64
"""How many processes of a call are looked at each time."""


def kill_tracers(call: Call) -> None:
    """Kill the tracers of a call's killed processes that keep them, if they are in its session: its
    agent or another tool. Others on the host are not the session's, and are only named."""
    try:
        pids = call.cgroup.all_procs()[:PIDS_MOST]
    except KnobError as error:
        log.debug("call %s: its processes cannot be read: %s", call.id, error)
        return
    for pid in pids:
        tracer = tracer_of(pid)
        if tracer and _is_inside(call.session, tracer):
            _kill(call, pid, tracer)


def kept_by(pid: int) -> str:
    """Say who keeps a killed process at its exit; empty: nobody does."""
    tracer = tracer_of(pid)
    if not tracer:
        return ""
    try:
        name = program_name(tracer)
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return f"process {pid} is kept by its tracer, process {tracer} ({name})"


def _is_inside(session: Session, pid: int) -> bool:
    try:
        return cgroup_of(pid).startswith(f"{session.cgroup_path}/")
    except (FileNotFoundError, ProcessLookupError, CgroupUnknown):
        return False


def _kill(call: Call, pid: int, tracer: int) -> None:
    try:
        pidfd = os.pidfd_open(tracer)
    except ProcessLookupError:
        return
    try:
        process = Process.of_pidfd(tracer, pidfd)
        # The pid may have been another's before the pidfd was there.
        if tracer_of(pid) != tracer:
            return
        who = f"its tracer, process {tracer}"
        what = f"process {pid} was kept at its exit by {who}, which was killed"
        call.account.add(what, "/proc/<pid>/status", unix_usec())
        log.warning("call %s: %s", call.id, what)
        process.signal(signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return
    finally:
        os.close(pidfd)
