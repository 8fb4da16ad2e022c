"""Carrying a plan out: the tool is started by an agent, which is its parent and sees its end by
waitpid(2); whoever is to end the call does so at the right moment."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format

from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.ends.plans import Plan
from tests.harness import IN_GUEST, PATIENCE, SLOW, AgentProcess, DaemonProcess, wait_until

TOOL = Path(__file__).with_name("tool.py")
TIMEOUT_S = (4.0 if IN_GUEST else 1.5) * SLOW
EVERY_S = 0.05 if IN_GUEST else 0.01
"""Pause between two looks, which take CPU time from the tools."""
HOLD_MIB = 70
CALL_MAX = "64M"
SESSION_MAX = "160M"

START = """
import resource
call_id = ""
began = time.monotonic()
if held:
    call_id = stub.BeginCall(pb.BeginCallRequest(name=name, intent=pb.Intent(**intent))).id
    options = ["--call", call_id]
tool = subprocess.Popen([EXEC, *options, "--", *argv], stderr=subprocess.DEVNULL)
result = (call_id, began)
"""
POLL = "result = tool.poll()"
WAIT = "result = tool.wait()"
DETACH = """
request = pb.EndCallRequest(call_id=call_id, reason=reason, detach=True)
stub.EndCall(request)
open(go, "w").close()
"""
KILL = "tool.kill(); result = tool.wait()"
HOLD = "held_here = b'x' * size; open(go, 'w').close()"
END = """
request = pb.EndCallRequest(call_id=call_id, reason=reason)
if status is not None:
    request.wait_status = -status if status < 0 else status << 8
result = stub.EndCall(request).SerializeToString()
"""


@dataclass
class Seen:
    """What was seen of an end from outside the daemon."""

    status: int | None
    """As subprocess gives it; None: nobody could wait for the tool."""
    notes: list[dict[str, Any]] = field(default_factory=list)
    ended_before_s: float | None = None
    """How long before the call's timeout the main process had ended; None: there was none, or it
    ended after it."""
    report: pb.Report = field(default_factory=pb.Report)
    alive: list[int] = field(default_factory=list)
    """Processes of the tool that lived when the report was there."""

    def noted(self, what: str) -> list[dict[str, Any]]:
        """The tool's notes of one kind."""
        return [note for note in self.notes if note["what"] == what]


class Carrier:
    """Carries plans out, one after the other, in a session of its own."""

    _names = itertools.count()
    _starting = threading.Lock()
    """Agents are forked one at a time (tests.zygote)."""

    def __init__(self, daemon: DaemonProcess, directory: Path, mount: Path, limits: bool) -> None:
        self._daemon, self._base, self._mount, self._limits = daemon, directory, mount, limits
        self._session = ""
        self._agent: AgentProcess | None = None
        self.elsewhere = daemon.cgroup_dir.with_name(
            f"{daemon.cgroup_dir.name}-{next(self._names)}"
        )
        self.elsewhere.mkdir()

    def close(self) -> None:
        """Remove the cgroup that tools leave for."""
        wait_until("all have ended", self._try_remove)

    def _try_remove(self) -> bool:
        try:
            self.elsewhere.rmdir()
        except OSError:
            return False
        return True

    def forget_agent(self) -> None:
        """Go on in another session, after something went wrong in this one."""
        self._agent = None

    def _enter(self) -> AgentProcess:
        if self._agent is None:
            self._session = f"ends-{next(self._names)}"
            limits = {"memory_max": SESSION_MAX} if self._limits else {}
            with self._starting:
                self._agent = self._daemon.open(self._session, **limits)
        return self._agent

    def carry_out(self, plan: Plan) -> Seen:
        """Carry a plan out; returns what was seen."""
        agent, name = self._enter(), f"t{plan.seed}"
        directory = self._base / name
        directory.mkdir()
        notes = directory / "notes"
        ways = {
            "elsewhere": str(self.elsewhere),
            "agent": str(self._daemon.cgroup_dir / self._session / "agent"),
        }
        intent = {"timeout": f"{TIMEOUT_S}"} if plan.ender == "timeout" else {}
        if intent and not plan.held:
            intent["leftovers"] = "keep"  # else they are ended soon after the main process
        if plan.oom == "call":
            intent["memory_max"] = CALL_MAX
        argv = [sys.executable, "-S", "-E", str(TOOL), json.dumps(asdict(plan)), str(notes)]
        argv += [str(self._mount), json.dumps(ways)]
        options = [word for key, value in intent.items() for word in (f"--{key}", value)]
        options = ["--name", name, *(o.replace("_", "-") for o in options)]
        call_id, began = agent.run(
            START, held=plan.held, name=name, intent=intent, options=options, argv=argv
        )
        seen = Seen(None)
        self._until_settled(agent, plan, notes, directory)
        if plan.end in ("exit", "signal", "oom"):
            seen.status = agent.run(WAIT)
            left = began + TIMEOUT_S - time.monotonic()
            seen.ended_before_s = left if plan.ender == "timeout" and left > 0 else None
        seen.report = self._end(agent, plan, name, call_id, seen)
        seen.notes = _read(notes)
        pids = {note["pid"] for note in seen.notes}
        deadline = time.monotonic() + 2 * PATIENCE
        while any(map(_lives, pids)) and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.alive = [pid for pid in pids if _lives(pid)]
        return seen

    def _until_settled(self, agent: AgentProcess, plan: Plan, notes: Path, directory: Path) -> None:
        """Wait until the tool has done what comes before its end, and help it to."""
        seen, go = directory / "seen", directory / "go"
        deadline = time.monotonic() + 30 * PATIENCE
        while time.monotonic() < deadline:
            what = [note["what"] for note in _read(notes)]
            if "left" in what and not seen.exists():
                pid = next(n["pid"] for n in _read(notes) if n["what"] == "left")
                if plan.children or self._told_of_leaving(pid):
                    seen.touch()
            if "waiting" in what and not (directory / "go").exists():
                agent.run(DETACH, reason=plan.reason, go=str(directory / "go"))
            if "settled" in what or "ending" in what or agent.run(POLL) is not None:
                break
            time.sleep(EVERY_S)
        if plan.oom == "session":
            agent.run(HOLD, size=HOLD_MIB << 20, go=str(go))

    def _told_of_leaving(self, pid: int) -> bool:
        """Whether the audit log says that this process left its call."""
        wanted = f'"pid":{pid}'
        for line in self._daemon.audit_path.read_text().split("\n"):
            if '"left_call"' in line and wanted in line.replace(" ", ""):
                return True
        return False

    def _end(
        self, agent: AgentProcess, plan: Plan, name: str, call_id: str, seen: Seen
    ) -> pb.Report:
        """Have the call ended as planned, and return its report."""
        admin = self._daemon.admin
        if plan.ender == "session":
            admin.CloseSession(pb.CloseSessionRequest(session_id=self._session))
            self._agent = None
            return self._of_audit(name)
        if plan.ender == "operator":
            self._end_by_operator(name)
        if plan.ender == "caller" and plan.end == "never":
            seen.status = agent.run(KILL)
        if plan.ender in ("agent", "caller"):
            report = agent.run(END, call_id=call_id, reason=plan.reason, status=seen.status)
        else:
            if plan.ender == "none" and plan.held:
                agent.run(END, call_id=call_id, reason=1, status=seen.status)
            wait_until("the call has ended", lambda: not self._open_call(name), 30, EVERY_S)
            report = self._report(name).SerializeToString()
        if seen.status is None:
            seen.status = agent.run(WAIT)
        if plan.oom == "session":
            agent.run("held_here = None")
        return pb.Report.FromString(report)

    def _end_by_operator(self, name: str) -> None:
        open_call = self._open_call(name)
        try:
            if open_call:
                self._daemon.admin.EndCall(pb.EndCallRequest(call_id=open_call))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            # It has ended by itself at this moment.

    def _open_call(self, name: str) -> str:
        listed = self._daemon.admin.ListCalls(pb.ListCallsRequest(session_id=self._session)).calls
        return next((call.id for call in listed if call.name == name), "")

    def _report(self, name: str) -> pb.Report:
        request = pb.ListReportsRequest(session_id=self._session, limit=20)
        reports = self._daemon.admin.ListReports(request).reports
        return next(report for report in reports if report.name == name)

    def _of_audit(self, name: str) -> pb.Report:
        """The report of a call whose session is gone, from the audit log."""
        for line in reversed(self._daemon.audit_lines()):
            if '"call_ended"' in line:
                report = json.loads(line)["report"]
                if report.get("name") == name:
                    return json_format.ParseDict(report, pb.Report(), ignore_unknown_fields=True)
        raise AssertionError(f"the audit log has no report of {name}")


def _read(notes: Path) -> list[dict[str, Any]]:
    if not notes.exists():
        return []
    return [json.loads(line) for line in notes.read_text().split("\n") if line]


def _lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def describe(plan: Plan, seen: Seen) -> str:
    """All that is needed to understand a mistake."""
    report, status = seen.report, seen.status
    told = [f"{pb.FeedbackCode.Name(f.code)}: {f.sentence}" for f in report.feedback]
    facts = [f"{f.what} [{f.source}]" for f in report.facts]
    return "\n".join(
        [
            f"{plan}",
            f"status {status}, ended {seen.ended_before_s} s before the timeout, notes:",
            *(f"  {note}" for note in seen.notes),
            f"report: {pb.Verdict.Name(report.verdict)} {report.sentence}",
            *(f"  {text}" for text in (*told, *facts)),
            f"pid {os.getpid()}",
        ]
    )
