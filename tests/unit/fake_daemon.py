"""A daemon without cgroups: both gRPC services on temporary sockets, and a launcher in bash.

It keeps the protocol's promises as far as the SDK can see them: calls and reports survive a
restart, EndCall ends what entered the call. What has no cgroup cannot be measured: numbers are made
up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest

from agentcgroup.errors import ERROR_TRAILER
from agentcgroup.v1 import agentcgroup_pb2 as pb
from agentcgroup.v1 import agentcgroup_pb2_grpc as rpc

MIB = 1 << 20
LAUNCHER = """\
#!/bin/bash
for option; do
    case $option in
    --call=*) call=${option#--call=} ;;
    --session=*) call=${option#--session=} ;;
    --socket=*) socket=${option#--socket=} ;;
    --error-fd=*) error=${option#--error-fd=} ;;
    --call-fd=*) read -r call <&"${option#--call-fd=}" || exit 125 ;;
    --) break ;;
    esac
done
printf '%s\\n' "$$" >> "${socket%/*}/entered-$call"
while [ "$1" != -- ]; do shift; done
shift
if ! command -v -- "$1" > /dev/null || case $1 in */*) [ ! -x "$1" ] ;; *) false ;; esac; then
    number=2
    [ -e "$1" ] && number=13
    [ -z "$error" ] || printf %s $number >&"$error"
    exit 127
fi
exec "$@"
"""


def refuse(
    context: grpc.ServicerContext, code: grpc.StatusCode, sentence: str, **parts: str
) -> NoReturn:
    """Fail an RPC as the daemon does: a sentence, and the same in parts as a trailer."""
    error = pb.Error(code=code.name, sentence=sentence, **parts)
    context.set_trailing_metadata(((ERROR_TRAILER, error.SerializeToString()),))
    context.abort(code, sentence)


class AttachSocket:
    """An attach socket that passes packets with gRPC's messages on to the gRPC socket beside it.

    Every other request is answered with `reply` and remembered as (pid, words).
    """

    def __init__(self, directory: Path) -> None:
        self.reply = b"OK\0call=c1\0"
        self._service = directory.name.capitalize()
        self.requests: list[tuple[int, list[str]]] = []
        self._path = directory / "attach.sock"
        self._channel = grpc.insecure_channel(
            f"unix:{directory}/grpc.sock", options=(("grpc.use_local_subchannel_pool", 1),)
        )
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(self._path))
        self._socket.listen(64)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(peer,), daemon=True).start()

    def _answer(self, peer: socket.socket) -> None:
        with peer:
            data = peer.recv(65536)
            if data.startswith(b"ACG1\0rpc\0"):
                method, _, raw = data[len(b"ACG1\0rpc\0") :].partition(b"\0")
                answer = self._forward(method.decode(), raw)
            else:
                raw_credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                pid: int = struct.unpack("3i", raw_credentials)[0]
                self.requests.append((pid, data.decode().split("\0")[:-1]))
                answer = self.reply
            if answer:
                with contextlib.suppress(OSError):
                    peer.send(answer)

    def _forward(self, method: str, raw: bytes) -> bytes:
        try:
            ask: Any = self._channel.unary_unary(f"/agentcgroup.v1.{self._service}/{method}")
            reply: bytes = ask(raw)
        except grpc.RpcError as error:
            metadata: Any = error.trailing_metadata() or ()
            trailer = dict(metadata).get(ERROR_TRAILER)
            return b"ERR\0" + trailer if trailer is not None else b""
        return b"OK\0" + reply

    def close(self) -> None:
        """Stop listening; whoever waits for an answer gets none."""
        self._path.unlink(missing_ok=True)
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._channel.close()


class FakeDaemon(rpc.AgentServicer, rpc.AdminServicer):
    """A daemon that can be started and stopped as often as needed; what it knows stays.

    Attributes:
        begun: every BeginCallRequest, oldest first. ended: every EndCallRequest; given_up:
            those for a command alone.
        before: by method name, what to do before it is served (e.g. stop the daemon).
        attempts: by method name, how often it was asked for.
    """

    page_items = 3
    """Items in a page of a list."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        for service in ("agent", "admin"):
            (run_dir / service).mkdir(parents=True, exist_ok=True)
        self.begun: list[pb.BeginCallRequest] = []
        self.ended: list[pb.EndCallRequest] = []
        self.given_up: list[pb.EndCallRequest] = []
        self.before: dict[str, Callable[[Any], None]] = {}
        self.attempts: dict[str, int] = {}
        self.calls: dict[str, pb.Call] = {}
        self.reports: dict[str, pb.Report] = {}
        self.sessions: dict[str, pb.Session] = {"s1": pb.Session(id="s1", priority=50)}
        self._lock = threading.Condition()
        self._feedback: list[pb.Feedback] = []
        self._server: grpc.Server | None = None
        self.attach: AttachSocket | None = None
        self._admin_attach: AttachSocket | None = None
        self.policy = pb.PolicyState(name="default")
        self.in_session = True
        self.operator = True
        self.not_enforced: list[str] = []
        self.agent_end = ""
        self.budget = pb.Budget(
            memory_limit_bytes=4096 * MIB,
            memory_available_bytes=1024 * MIB,
            cpu_limit_millicores=2000,
            cpu_available_millicores=1500,
            calls_max=64,
            sentence="1.0 GiB of 4.0 GiB is free.",
        )
        launcher = run_dir / "agentcg-exec"
        launcher.write_text(LAUNCHER)
        launcher.chmod(0o755)
        self.launcher = launcher

    def start(self) -> None:
        """Listen on both sockets."""
        self._server = grpc.server(futures.ThreadPoolExecutor(16))
        rpc.add_AgentServicer_to_server(self, self._server)
        rpc.add_AdminServicer_to_server(self, self._server)
        for service in ("agent", "admin"):
            self._server.add_insecure_port(f"unix:{self.run_dir}/{service}/grpc.sock")
        self._server.start()
        self.attach = AttachSocket(self.run_dir / "agent")
        self._admin_attach = AttachSocket(self.run_dir / "admin")

    def stop(self) -> None:
        """Go away at once, with whatever is being served; the sockets go too."""
        server, self._server = self._server, None
        attached = (self.attach, self._admin_attach)
        self.attach = self._admin_attach = None
        for attach in attached:
            if attach is not None:
                attach.close()
        if server is not None:
            # gRPC unlinks the sockets' paths when it is done, which must not be those of the next
            # start. From within an RPC it cannot be done before that RPC is.
            server.stop(0).wait(timeout=1)
            with self._lock:
                self._lock.notify_all()
            for service in ("agent", "admin"):
                (self.run_dir / service / "grpc.sock").unlink(missing_ok=True)

    def entered(self, call_id: str, service: str = "agent") -> list[int]:
        """Return the processes that entered a call (or, as admin, a session)."""
        path = self.run_dir / service / f"entered-{call_id}"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def say(self, sentence: str, call_id: str = "") -> None:
        """Send feedback to whoever watches."""
        with self._lock:
            self._feedback.append(
                pb.Feedback(
                    call_id=call_id,
                    session_id="s1",
                    code=pb.FEEDBACK_CODE_FROZEN,
                    sentence=sentence,
                    numbers={"frozen_usec": 1500.0},
                    at_unix_usec=1_700_000_000_000_000,
                )
            )
            self._lock.notify_all()

    def _page(self, items: list[Any], token: str) -> tuple[list[Any], str]:
        """A page of a list, which begins where the page before ended, and the next one's token."""
        begin = int(token or 0)
        end = begin + self.page_items
        return items[begin:end], str(end) if end < len(items) else ""

    def _hook(self, method: str, context: grpc.ServicerContext, request: Any = None) -> None:
        self.attempts[method] = self.attempts.get(method, 0) + 1
        hook = self.before.pop(method, None)
        if hook is not None:
            hook(request)
            while self._server is None and context.is_active():
                time.sleep(0.01)  # It has died in there: no answer.
        if not self.in_session:
            refuse(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                "process 7 is in no session",
                field="session",
            )

    # Agent

    def GetSession(self, request: Any, context: grpc.ServicerContext) -> pb.Session:
        self._hook("GetSession", context)
        return self.sessions["s1"]

    def GetBudget(self, request: Any, context: grpc.ServicerContext) -> pb.Budget:
        self._hook("GetBudget", context)
        self.budget.calls_open = len(self.calls)
        return self.budget

    def BeginCall(self, request: pb.BeginCallRequest, context: grpc.ServicerContext) -> pb.Call:
        self._hook("BeginCall", context, request)
        if request.intent.memory_max == "lots":
            refuse(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                "memory_max: 'lots' cannot be used",
                field="memory_max",
                value="lots",
                allowed="bytes, e.g. 512M",
            )
        if request.intent.memory == "1P":
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "64 calls are open already")
        self.begun.append(request)
        call = pb.Call(
            id=f"c{len(self.begun)}",
            session_id="s1",
            name=request.name,
            argv=request.argv,
            state=pb.CALL_STATE_PENDING,
            began_unix_usec=1_700_000_000_000_000,
            usage=pb.Usage(memory_current_bytes=3 * MIB, cpu_usage_usec=1000),
            grant=pb.Grant(cpu_weight=100, priority=50, on_pressure="freeze", pids_max=512),
        )
        if request.intent.memory_max == "512M":
            call.grant.memory_max_bytes = 512 * MIB
        self.calls[call.id] = call
        return call

    def EndCall(self, request: pb.EndCallRequest, context: grpc.ServicerContext) -> pb.Report:
        self._hook("EndCall", context, request)
        if request.command_only:
            self.given_up.append(request)
            return pb.Report(call_id=request.call_id)
        self.ended.append(request)
        call = self.calls.pop(request.call_id, None)
        if call is None:
            refuse(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"no call {request.call_id} is open",
                field="call_id",
                value=request.call_id,
            )
        if not request.detach:
            for pid in self.entered(call.id):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        report = self.report_of(call, request)
        self.reports[call.id] = report
        return report

    def report_of(self, call: pb.Call, request: pb.EndCallRequest) -> pb.Report:
        """Make the report of an ended call from the wait status alone."""
        report = pb.Report(
            call_id=call.id,
            session_id=call.session_id,
            name=call.name,
            argv=call.argv,
            grant=call.grant,
            wall_usec=12_345,
            memory_peak_bytes=190 * MIB,
            evidence=pb.EVIDENCE_CLIENT,
        )
        status = request.wait_status if request.HasField("wait_status") else None
        if status is None:
            report.verdict, report.evidence = pb.VERDICT_CANCELLED, pb.EVIDENCE_NONE
        elif os.WIFSIGNALED(status):
            report.verdict, report.term_signal = pb.VERDICT_SIGNALED, os.WTERMSIG(status)
        else:
            report.exit_code = os.WEXITSTATUS(status)
            report.verdict = pb.VERDICT_FAILED if report.exit_code else pb.VERDICT_OK
        report.sentence = f"{call.name} ended."
        report.feedback.add(
            call_id=call.id, code=pb.FEEDBACK_CODE_THAWED, sentence="It was frozen."
        )
        return report

    def UpdateIntent(
        self, request: pb.UpdateIntentRequest, context: grpc.ServicerContext
    ) -> pb.Call:
        self._hook("UpdateIntent", context)
        call = self.calls[request.call_id]
        if request.intent.memory_max == "1G":
            call.grant.memory_max_bytes = 1024 * MIB
        return call

    def ListCalls(self, request: Any, context: grpc.ServicerContext) -> pb.ListCallsResponse:
        self._hook("ListCalls", context)
        calls, token = self._page(list(self.calls.values()), request.page_token)
        return pb.ListCallsResponse(calls=calls, next_page_token=token)

    def GetReport(self, request: pb.GetReportRequest, context: grpc.ServicerContext) -> pb.Report:
        self._hook("GetReport", context)
        found = list(self.reports.values())[-1:]
        if request.call_id:
            found = [r for r in self.reports.values() if r.call_id == request.call_id]
        if not found:
            refuse(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"there is no report of call {request.call_id!r}",
                field="call_id",
                value=request.call_id,
            )
        return found[0]

    def ListReports(self, request: Any, context: grpc.ServicerContext) -> pb.ListReportsResponse:
        self._hook("ListReports", context)
        newest = list(self.reports.values())[::-1]
        reports, token = self._page(newest, request.page_token)
        return pb.ListReportsResponse(reports=reports[: request.limit or 20], next_page_token=token)

    def ListHistory(self, request: Any, context: grpc.ServicerContext) -> pb.ListHistoryResponse:
        self._hook("ListHistory", context, request)
        newest = [
            report
            for report in list(self.reports.values())[::-1]
            if not request.verdicts or report.verdict in request.verdicts
        ]
        reports, token = self._page(newest, request.page_token)
        return pb.ListHistoryResponse(reports=reports[: request.limit or 20], next_page_token=token)

    def ListPastSessions(
        self, request: Any, context: grpc.ServicerContext
    ) -> pb.ListPastSessionsResponse:
        self._check_operator(context)
        sums = pb.SessionSums(calls=3, calls_not_ok=1, cpu_usage_usec=2_500_000)
        past = pb.PastSession(
            session=pb.Session(id="old", priority=50, opened_unix_usec=1_700_000_000_000_000),
            closed_unix_usec=1_700_000_060_000_000,
            closed_why="the operator closed it",
            sums=sums,
        )
        return pb.ListPastSessionsResponse(sessions=[past])

    def ListUsage(self, request: Any, context: grpc.ServicerContext) -> pb.ListUsageResponse:
        self._hook("ListUsage", context, request)
        sums = pb.SessionSums(calls=4, cpu_usage_usec=90_000_000, memory_byte_seconds=3600.0 * MIB)
        return pb.ListUsageResponse(usages=[pb.Usages(key="web", sums=sums)])

    def GetStory(self, request: pb.GetStoryRequest, context: grpc.ServicerContext) -> pb.Story:
        self._hook("GetStory", context)
        report = self.reports.get(request.call_id)
        if report is None:
            sentence = f"nothing is known of a call {request.call_id!r}"
            refuse(context, grpc.StatusCode.NOT_FOUND, sentence, field="call_id")
        at = 1_700_000_000_000_000
        return pb.Story(
            call_id=report.call_id,
            session_id=report.session_id,
            name=report.name,
            steps=[
                pb.Step(at_unix_usec=at, what="asked", sentence="It asked for memory 512 MiB."),
                pb.Step(at_unix_usec=at + 1500, what="freeze", sentence="It was paused: room."),
            ],
            steps_left_out=2,
            report=report,
            advice=["Ask for more memory_max."],
        )

    def WatchFeedback(
        self, request: pb.WatchFeedbackRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.Feedback]:
        self._hook("WatchFeedback", context)
        yield from self._follow(context)

    def _follow(self, context: grpc.ServicerContext) -> Iterator[pb.Feedback]:
        server = self._server
        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: bool(self._feedback) or self._server is not server, timeout=0.2
                )
                if self._server is not server or not context.is_active():
                    return
                new, self._feedback = self._feedback, []
            yield from new

    # Admin

    def _check_operator(self, context: grpc.ServicerContext) -> None:
        if not self.operator:
            refuse(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                "a process of session s1 may not act as the operator",
            )

    def GetPool(self, request: Any, context: grpc.ServicerContext) -> pb.Pool:
        self._check_operator(context)
        return pb.Pool(
            cgroup_path="/agentcg",
            memory_max_bytes=8192 * MIB,
            memory_current_bytes=300 * MIB,
            cpu_millicores=4000,
            sessions_open=len(self.sessions),
            calls_open=len(self.calls),
            controllers=["cpu", "memory", "pids"],
            version="1.2.3",
            kernel="7.3.4",
        )

    def OpenSession(
        self, request: pb.OpenSessionRequest, context: grpc.ServicerContext
    ) -> pb.Session:
        self._hook("OpenSession", context)
        spec = request.spec
        if spec.id in self.sessions:
            refuse(context, grpc.StatusCode.ALREADY_EXISTS, f"session {spec.id} is open already")
        session = pb.Session(id=spec.id, priority=50, cgroup_path=f"/agentcg/{spec.id}")
        session.not_enforced.extend(self.not_enforced)
        session.owner_pid = int(request.end_with_caller)
        if spec.memory_max == "2G":
            session.memory_max_bytes = 2048 * MIB
        session.labels.update(spec.labels)
        self.sessions[spec.id] = session
        return session

    def UpdateSession(
        self, request: pb.UpdateSessionRequest, context: grpc.ServicerContext
    ) -> pb.Session:
        self._hook("UpdateSession", context)
        spec = request.spec
        session = self.sessions.get(spec.id)
        if session is None:
            sentence = f"no session {spec.id!r} is open"
            refuse(context, grpc.StatusCode.NOT_FOUND, sentence, field="session_id", value=spec.id)
        if spec.memory_max == "1M":
            sentence = "memory_max: '1M' cannot be used; allowed is at least memory_low (5 MiB)"
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, sentence, field="memory_max")
        if spec.memory_max == "2G":
            session.memory_max_bytes = 2048 * MIB
        return session

    def AdoptSession(
        self, request: pb.AdoptSessionRequest, context: grpc.ServicerContext
    ) -> pb.Session:
        session = pb.Session(id=request.spec.id, adopted=True, cgroup_path=request.cgroup_path)
        self.sessions[session.id] = session
        return session

    def CloseSession(
        self, request: pb.CloseSessionRequest, context: grpc.ServicerContext
    ) -> pb.CloseSessionResponse:
        if self.sessions.pop(request.session_id, None) is None:
            refuse(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"no session {request.session_id!r} is open",
                field="session_id",
                value=request.session_id,
            )
        return pb.CloseSessionResponse(
            calls_ended=2, agent_oom_kills=int(bool(self.agent_end)), agent_sentence=self.agent_end
        )

    def ListSessions(self, request: Any, context: grpc.ServicerContext) -> pb.ListSessionsResponse:
        self._check_operator(context)
        sessions, token = self._page(list(self.sessions.values()), request.page_token)
        return pb.ListSessionsResponse(sessions=sessions, next_page_token=token)

    def GetPolicy(self, request: Any, context: grpc.ServicerContext) -> pb.PolicyState:
        self._check_operator(context)
        return self.policy

    def ReloadPolicy(self, request: Any, context: grpc.ServicerContext) -> pb.PolicyState:
        if self.policy.error:
            refuse(context, grpc.StatusCode.FAILED_PRECONDITION, self.policy.error, field="policy")
        return self.policy

    def PauseCall(self, request: pb.PauseCallRequest, context: grpc.ServicerContext) -> pb.Call:
        call = self._open(request.call_id, context)
        call.state, call.held, call.paused_why = pb.CALL_STATE_FROZEN, True, request.why
        return call

    def ResumeCall(self, request: pb.ResumeCallRequest, context: grpc.ServicerContext) -> pb.Call:
        call = self._open(request.call_id, context)
        call.state, call.held, call.paused_why = pb.CALL_STATE_RUNNING, False, ""
        return call

    def _open(self, call_id: str, context: grpc.ServicerContext) -> pb.Call:
        if call_id not in self.calls:
            sentence = f"no call {call_id!r} is open"
            refuse(context, grpc.StatusCode.NOT_FOUND, sentence, field="call_id")
        return self.calls[call_id]

    def ExplainCall(
        self, request: pb.ExplainCallRequest, context: grpc.ServicerContext
    ) -> pb.Explanation:
        if request.call_id not in self.calls:
            sentence = f"no call {request.call_id!r} is open"
            refuse(context, grpc.StatusCode.NOT_FOUND, sentence, field="call_id")
        paused = pb.Feedback(code=pb.FEEDBACK_CODE_FROZEN, sentence="Paused.", at_unix_usec=1)
        return pb.Explanation(
            call_id=request.call_id,
            sentence="It runs.",
            numbers={"memory_bytes": 5.0},
            history=[paused],
            outlook=["freeze: soon"],
        )

    def WatchEvents(
        self, request: pb.WatchEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.Event]:
        for feedback in self._follow(context):
            yield pb.Event(feedback=feedback)


def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """Yield a started daemon that the environment points to; the body of a fixture."""
    # Not tmp_path: a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="acg-") as directory:
        fake = FakeDaemon(Path(directory))
        monkeypatch.setenv("AGENTCG_RUN_DIR", directory)
        monkeypatch.setenv("AGENTCG_EXEC", str(fake.launcher))
        monkeypatch.delenv("AGENTCG_ON_UNAVAILABLE", raising=False)
        fake.start()
        yield fake
        fake.stop()


def later(delay: float, action: Callable[[], None]) -> threading.Timer:
    """Do something in a moment, while the caller waits for its effect."""
    timer = threading.Timer(delay, action)
    timer.start()
    return timer
