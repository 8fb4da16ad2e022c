"""`agentcg otel`: spans of ended calls, as a receiver gets them from the real exporter."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from agentcgroup import Admin, Agent, cli
from agentcgroup.cli import otel as command
from agentcgroup.errors import InvalidIntent
from agentcgroup.otel import spans
from agentcgroup.otel.follow import Follower
from agentcgroup.otel.sending import Sender
from agentcgroup.types import CallInfo, Event, Report
from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.harness import wait_until
from tests.unit.fake_daemon import FakeDaemon, running

S = 1_000_000
BEGAN = 1_767_261_845 * S
EVIL = "\x1b[31m\u202e" + "x" * 5000


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    yield from running(monkeypatch)


class Receiver:
    """An OTLP receiver. status: what it answers with. may_answer: cleared, it does not answer."""

    def __init__(self, address: str) -> None:
        self.url = f"{address}/v1/traces"
        self.status = 200
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.requests = 0

    def take(self, path: str, body: bytes) -> int:
        """Take a request, and return the status."""
        self.requests += 1
        self.may_answer.wait(30)
        if path != "/v1/traces":
            return 404
        if self.status == 200:
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resources.append(values(group.resource.attributes))
                for scope in group.scope_spans:
                    self.spans += scope.spans
        return self.status

    def names(self) -> list[str]:
        """Return the names of the calls whose spans came."""
        return [values(span.attributes)["agentcgroup.call.id"] for span in self.spans]


def values(attributes: Any) -> dict[str, Any]:
    """Attributes of the protocol as plain data."""
    found: dict[str, Any] = {}
    for each in attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        if kind == "array_value":
            value = [item.string_value for item in value.values]
        found[each.key] = value
    return found


@contextmanager
def receiving() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = made.take(self.path, body)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made = Receiver(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield made
        made.may_answer.set()
        server.shutdown()
        thread.join(10)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


def report(call_id: str, parent: str = "", **rest: Any) -> Report:
    values = {"verdict": pb.VERDICT_OK, "sentence": "It ended with status 0.", "name": "pytest"}
    made = pb.Report(
        call_id=call_id,
        session_id="planner",
        began_unix_usec=BEGAN,
        wall_usec=8 * S,
        parent_call_id=parent,
        argv=["pytest", "--token=secret"],
        **{**values, **rest},
    )
    return Report.from_proto(made)


def span(made: Report, root: str = "") -> ReadableSpan:
    return spans.span(made, root or made.call_id, Resource.create({}))


def sent(receiver: Receiver, *made: ReadableSpan) -> list[Span]:
    sender = Sender(OTLPSpanExporter(endpoint=receiver.url))
    for each in made:
        assert sender.offer(each)
    assert sender.close(20).sent == len(made)
    return receiver.spans


# What a span tells


def test_a_call_is_a_span_with_what_it_asked_got_and_used(receiver: Receiver) -> None:
    grant = pb.Grant(memory_expected_bytes=5, memory_max_bytes=9, cpu_weight=100, priority=80)
    made = report(
        "c1",
        grant=grant,
        waited_usec=2 * S,
        exit_code=0,
        memory_peak_bytes=7,
        cpu_usage_usec=1_500_000,
        tool_use_id="toolu_1",
        feedback=[
            pb.Feedback(
                code=pb.FEEDBACK_CODE_FROZEN, sentence="Paused.", at_unix_usec=BEGAN + 3 * S
            )
        ],
    )
    (found,) = sent(receiver, span(made))
    assert found.name == "execute_tool pytest" and found.kind == Span.SPAN_KIND_INTERNAL
    assert found.start_time_unix_nano == (BEGAN - 2 * S) * 1000
    assert found.end_time_unix_nano == (BEGAN + 8 * S) * 1000
    told = values(found.attributes)
    assert told["gen_ai.operation.name"] == "execute_tool"
    assert told["gen_ai.tool.name"] == "pytest" and told["gen_ai.tool.call.id"] == "toolu_1"
    assert told["process.exit.code"] == 0 and "error.type" not in told
    assert told["agentcgroup.session.id"] == "planner" and told["agentcgroup.verdict"] == "ok"
    assert told["agentcgroup.grant.memory.max"] == 9 and told["agentcgroup.grant.priority"] == 80
    assert "agentcgroup.grant.memory.high" not in told, "no limit is no number"
    assert told["agentcgroup.memory.peak"] == 7 and told["agentcgroup.cpu.time"] == 1.5
    assert [(e.name, e.time_unix_nano // 1000 - BEGAN) for e in found.events] == [
        ("began", 0),
        ("frozen", 3 * S),
    ]
    assert values(found.events[1].attributes)["agentcgroup.sentence"] == "Paused."
    assert found.status.code == 0


def test_a_call_that_did_not_end_well_is_an_error(receiver: Receiver) -> None:
    sentence = "It reached its own limit."
    made = report("c1", verdict=pb.VERDICT_OOM_CALL, sentence=sentence)
    (found,) = sent(receiver, span(made))
    assert (found.status.code, found.status.message) == (2, sentence)
    assert values(found.attributes)["error.type"] == "oom_call"


def test_arguments_are_told_only_where_that_is_asked_for() -> None:
    made = report("c1")
    assert "secret" not in str(spans.attributes(made))
    args = spans.attributes(made, command_lines=True)["process.command_args"]
    assert args == ["pytest", "--token=secret"]


def test_calls_in_calls_are_one_trace(receiver: Receiver) -> None:
    inner, outer = report("c2", "c1"), report("c1")
    first, second = sent(receiver, span(inner, "c1"), span(outer, "c1"))
    assert first.trace_id == second.trace_id
    assert first.parent_span_id == second.span_id and not second.parent_span_id
    assert span(inner, "c1").context == span(inner, "c1").context, "sent twice it is the same"


def test_text_of_others_is_short_and_printable_and_times_are_in_range(receiver: Receiver) -> None:
    far = pb.Feedback(
        code=pb.FEEDBACK_CODE_OOM, sentence=EVIL, at_unix_usec=1 << 62, numbers={EVIL: 1.0}
    )
    made = report(
        "c1",
        name=EVIL,
        sentence=EVIL,
        verdict=pb.VERDICT_FAILED,
        feedback=[far] * 500,
        tool_use_id=EVIL,
    )
    (found,) = sent(receiver, span(made))
    text = str(found)
    assert "\\033" not in text and "\\342\\200\\256" not in text
    assert len(found.name) <= 1100 and len(found.events) == spans.EVENTS_MOST
    assert all(e.time_unix_nano <= found.end_time_unix_nano for e in found.events)
    nonsense = Report.from_proto(
        pb.Report(call_id="c2", began_unix_usec=1 << 62, wall_usec=1 << 62)
    )
    made_up = span(nonsense)
    assert 0 <= (made_up.start_time or 0) <= (made_up.end_time or 0) < 1 << 63


# Sending


def test_a_receiver_that_does_not_answer_makes_nobody_wait(receiver: Receiver) -> None:
    receiver.may_answer.clear()
    sender = Sender(OTLPSpanExporter(endpoint=receiver.url, timeout=60), queue_most=20)
    made = span(report("c1"))
    assert sender.offer(made)
    wait_until("the first batch is on its way", lambda: receiver.requests == 1)
    began = time.monotonic()
    taken = sum(sender.offer(made) for _ in range(1000))
    assert time.monotonic() - began < 2
    assert taken == 20
    counts = sender.counts()
    assert (counts.sent, counts.lost_full, counts.waiting) == (0, 980, 21)
    began = time.monotonic()
    end = sender.close(0.5)
    assert time.monotonic() - began < 10
    assert end.lost_full + end.lost_refused + end.sent == 1001 and end.waiting == 0


@pytest.mark.parametrize("status", [400, 404])
def test_what_the_receiver_refuses_is_counted_and_the_next_is_sent(
    receiver: Receiver, status: int
) -> None:
    sender = Sender(OTLPSpanExporter(endpoint=receiver.url))
    receiver.status = status
    sender.offer(span(report("c1")))
    wait_until("it is refused", lambda: sender.counts().lost_refused == 1, 30)
    receiver.status = 200
    sender.offer(span(report("c2")))
    wait_until("the next is sent", lambda: sender.counts().sent == 1, 30)
    assert sender.close().to_dict() == {
        "sent": 1,
        "lost_full": 0,
        "lost_refused": 1,
        "waiting": 0,
    }
    assert receiver.names() == ["c2"]


def test_an_exporter_that_raises_ends_nothing() -> None:
    class Broken(OTLPSpanExporter):
        def export(self, spans: Any) -> Any:
            raise RuntimeError("broken")

    sender = Sender(Broken(endpoint="http://127.0.0.1:9/"))
    sender.offer(span(report("c1")))
    wait_until("it is counted", lambda: sender.counts().lost_refused == 1)
    sender.offer(span(report("c2")))
    wait_until("the next too", lambda: sender.counts().lost_refused == 2)
    sender.close()


# Following


class Kept:
    """Takes spans as a sender does."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def offer(self, made: ReadableSpan) -> bool:
        self.spans.append(made)
        return True

    def names(self) -> list[Any]:
        return [(made.attributes or {})["agentcgroup.call.id"] for made in self.spans]


def follower(kept: Kept, since: float = 0) -> Follower:
    return Follower(Admin, kept, since=since)  # type: ignore[arg-type]  # as much as is needed


def test_each_call_is_sent_once_whoever_tells_of_it(daemon: FakeDaemon) -> None:
    with Agent() as agent:
        agent.run(["true"])
        agent.run(["false"])
    kept = Kept()
    following = follower(kept)
    following.catch_up()
    assert kept.names() == ["c1", "c2"], "oldest first"
    following.heard(Event(ended=Report.from_proto(daemon.reports["c2"])))
    following.catch_up()
    following.heard(Event(ended=report("c3")))
    assert kept.names() == ["c1", "c2", "c3"]


def test_the_store_is_asked_from_the_time_that_was_given(daemon: FakeDaemon) -> None:
    asked: list[pb.ListHistoryRequest] = []
    daemon.before["ListHistory"] = asked.append
    following = follower(Kept(), since=1_700_000_000)
    following.catch_up()
    assert asked[0].since_unix_usec == 1_700_000_000 * S
    daemon.before["ListHistory"] = asked.append
    following.catch_up()
    assert time.time() - asked[1].since_unix_usec / 1e6 < 120


def test_the_outermost_call_is_found_over_several(daemon: FakeDaemon) -> None:
    kept = Kept()
    following = follower(kept)
    for call_id, parent in (("c1", ""), ("c2", "c1")):
        begun = CallInfo.from_proto(pb.Call(id=call_id, parent_call_id=parent))
        following.heard(Event(begun=begun))
    following.heard(Event(ended=report("c3", "c2")))
    (made,) = kept.spans
    assert made.context is not None and made.context.trace_id == spans.trace_id("c1")
    circle = [("a", "b"), ("b", "a")]
    for call_id, parent in circle:
        following.heard(Event(ended=report(call_id, parent)))
    assert len(kept.spans) == 3, "a circle ends"


# The command


@pytest.mark.parametrize(
    "given",
    [
        "http://collector.example/v1/traces",
        "http://127.0.0.1.example/",
        "http://192.0.2.1:4318/",
        "ftp://127.0.0.1/",
        "127.0.0.1:4318",
        "http://[::1",
        "http://127.0.0.1:x/",
    ],
)
def test_nothing_goes_to_others_in_the_clear(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidIntent, match="endpoint: "):
        command.endpoint(given)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", given)
    assert cli.main(["otel"]) == 4
    assert "allowed is https://" in capsys.readouterr().err


def test_where_spans_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert command.endpoint(None) == "http://127.0.0.1:4318/v1/traces"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector.example:4318/")
    assert command.endpoint(None) == "https://collector.example:4318/v1/traces"
    assert command.endpoint("http://[::1]:1/x") == "http://[::1]:1/x"


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_the_command_sends_until_it_is_interrupted(
    daemon: FakeDaemon, receiver: Receiver, words: tuple[str, ...]
) -> None:
    with Agent() as agent:
        agent.run(["true"])
    script = "import sys; from agentcgroup import cli; sys.exit(cli.main(sys.argv[1:]))"
    argv = ["otel", "--endpoint", receiver.url, "--since", "2020-01-01T00:00", *words]
    with subprocess.Popen(
        [sys.executable, "-c", script, *argv],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
    ) as process:
        wait_until("a span came", lambda: receiver.names() == ["c1"], 60)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
    assert receiver.resources[0]["service.name"] == "agentcgroup"
    if words:
        last = json.loads(out.splitlines()[-1])
        assert last == {"sent": 1, "lost_full": 0, "lost_refused": 0, "waiting": 0}
    else:
        assert re.search(r"^1 spans sent, 0 lost$", out, re.MULTILINE)
