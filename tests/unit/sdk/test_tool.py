"""The decorator, and the types and errors that need no daemon."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import shutil
import subprocess
import typing
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import agentcgroup
from agentcgroup import (
    Agent,
    AsyncAgent,
    AsyncCall,
    Call,
    errors,
    keywords,
    paths,
    results,
    tool,
    types,
)
from agentcgroup.intent import INTENT_FIELDS, cut_argv
from agentcgroup.v1 import agentcgroup_pb2 as pb
from tests.unit.fake_daemon import FakeDaemon, running

PACKAGE = Path(agentcgroup.__file__).parent


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    yield from running(monkeypatch)


def test_sync_tool(daemon: FakeDaemon) -> None:
    with Agent() as agent:

        @tool(memory="512M", agent=agent)
        def greet(call: Call, who: str, *, loud: bool = False) -> str:
            """Say hello."""
            out: str = call.run(["echo", who], capture_output=True, text=True).stdout
            return out.upper() if loud else out

        assert greet("you", loud=True) == "YOU\n"
    assert (greet.__name__, greet.__doc__) == ("greet", "Say hello.")
    assert list(inspect.signature(greet).parameters) == ["who", "loud"]
    assert typing.get_type_hints(greet) == {"who": str, "loud": bool, "return": str}
    assert (daemon.begun[0].name, daemon.begun[0].intent.memory) == ("greet", "512M")
    assert not daemon.calls


def test_async_tool(daemon: FakeDaemon) -> None:
    async def main() -> None:
        async with AsyncAgent() as agent:

            @tool(name="adder", agent=agent, cpu_max=1)
            async def add(call: AsyncCall, a: int, b: int) -> int:
                result = await call.run(["echo", str(a + b)], capture_output=True)
                return int(result.stdout)

            assert inspect.iscoroutinefunction(add)
            assert await add(2, b=3) == 5

    asyncio.run(main())
    assert (daemon.begun[0].name, daemon.begun[0].intent.cpu_max) == ("adder", "1")


def test_tool_with_the_wrong_kind_of_agent() -> None:
    with pytest.raises(TypeError, match="AsyncAgent"):

        @tool(agent=Agent())
        async def one(call: AsyncCall) -> None: ...

    with pytest.raises(TypeError, match="no coroutine"):

        @tool(agent=AsyncAgent())
        def two(call: Call) -> None: ...


def test_a_tool_without_parentheses(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    with Agent() as agent:
        monkeypatch.setattr("agentcgroup.decorator.default_agent", lambda: agent)

        @tool
        def greet(call: Call, who: str) -> str:
            return str(call.run(["echo", who], capture_output=True, text=True).stdout)

        assert greet("you") == "you\n"
        assert list(inspect.signature(greet).parameters) == ["who"]
    assert daemon.begun[0].name == "greet"


def _no_parameter() -> None: ...


def _other(path: str) -> None: ...


def _only_by_name(*, call: Call) -> None: ...


async def _sync_call(call: Call) -> None: ...


def _async_call(call: AsyncCall) -> None: ...


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (_no_parameter, "_no_parameter has no parameter for its call"),
        (_only_by_name, "_only_by_name has no parameter for its call"),
        (_other, "its first parameter path: .*str.* is for something else"),
        (_sync_call, r"def _sync_call\(call: AsyncCall, ...\)"),
        (_async_call, r"def _async_call\(call: Call, ...\)"),
    ],
)
def test_a_function_without_a_call_is_refused_where_it_is_decorated(
    function: typing.Any, said: str
) -> None:
    with pytest.raises(TypeError, match=said):
        tool(function)
    with pytest.raises(TypeError, match=said):
        tool(memory="1G")(function)


def test_a_field_that_makes_no_sense_is_refused_where_the_function_is_decorated() -> None:
    wrong: dict[str, typing.Any] = {"memry": "1G"}
    with pytest.raises(TypeError, match="field of an intent: 'memry'; did you mean 'memory'"):
        tool(**wrong)
    wrong = {"memory": True}
    with pytest.raises(errors.InvalidIntent, match="memory is True"):
        tool(**wrong)


def test_a_first_parameter_may_have_no_type(daemon: FakeDaemon) -> None:
    scope: dict[str, typing.Any] = {}
    exec("def free(call, word):\n    return word, call.id", scope)
    with Agent() as agent:
        made: typing.Any = tool(agent=agent)(scope["free"])
        assert made("x") == ("x", "c1")


UNKNOWN: list[tuple[dict[str, typing.Any], str]] = [
    (
        {"memry": "1G"},
        "run.. got an unexpected keyword argument 'memry'; did you mean 'memory'",
    ),
    ({"captureoutput": True}, "did you mean 'capture_output'"),
    ({"bananas": 1}, "unexpected keyword argument 'bananas'$"),
]


@pytest.mark.parametrize(("given", "said"), UNKNOWN)
def test_an_unknown_keyword_is_named(
    daemon: FakeDaemon, given: dict[str, typing.Any], said: str
) -> None:
    async def run_async() -> None:
        async with AsyncAgent() as agent:
            await agent.run(["true"], **given)

    with pytest.raises(TypeError, match=said), Agent() as agent:
        agent.run(["true"], **given)
    with pytest.raises(TypeError, match=said):
        asyncio.run(run_async())
    assert not daemon.begun, "no call was begun for it"


def test_a_field_of_the_intent_that_comes_too_late_is_told(daemon: FakeDaemon) -> None:
    late: dict[str, typing.Any] = {"memory_max": "1G"}
    with Agent() as agent, agent.tool_call("x") as call:
        with pytest.raises(TypeError, match="belongs to the call"):
            call.run(["true"], **late)
        with pytest.raises(TypeError, match="belongs to the call"):
            call.popen(["true"], **late)
        with pytest.raises(TypeError, match="unknown field of an intent: 'memry'; did you mean"):
            call.update(**typing.cast(typing.Any, {"memry": 1}))


@pytest.mark.parametrize("timeout", ["50ms", "0.05s", ".05", 0.05])
def test_a_timeout_may_be_text(daemon: FakeDaemon, timeout: str | float) -> None:
    async def run_async() -> None:
        async with AsyncAgent() as agent:
            await agent.run(["sleep", "30"], timeout=timeout)

    with pytest.raises(subprocess.TimeoutExpired) as caught, Agent() as agent:
        agent.run(["sleep", "30"], timeout=timeout)
    assert caught.value.timeout == 0.05
    with pytest.raises(subprocess.TimeoutExpired):
        asyncio.run(run_async())


@pytest.mark.parametrize("timeout", ["soon", "5 parsecs", "-1s", "", True, ["1"]])
def test_a_timeout_that_is_none_is_named(daemon: FakeDaemon, timeout: typing.Any) -> None:
    with Agent() as agent, pytest.raises(errors.InvalidIntent) as caught:
        agent.run(["true"], timeout=timeout)
    assert caught.value.field == "timeout" and "'250ms'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 90), ("1.5s", 1.5), ("10m", 600), ("2h", 7200), ("1d", 86400), (3, 3), (None, None)],
)
def test_times_as_text(text: str | None, value: float | None) -> None:
    assert keywords.seconds("timeout", text) == value


MESSAGES = [
    (types.Grant, pb.Grant),
    (types.Usage, pb.Usage),
    (types.CallInfo, pb.Call),
    (types.Feedback, pb.Feedback),
    (types.Fact, pb.Fact),
    (types.Report, pb.Report),
    (types.Budget, pb.Budget),
    (types.SessionInfo, pb.Session),
    (types.PoolInfo, pb.Pool),
    (types.RulesetState, pb.RulesetState),
    (types.PolicyState, pb.PolicyState),
    (types.Explanation, pb.Explanation),
    (types.Event, pb.Event),
    (types.SessionEnd, pb.CloseSessionResponse),
]


@pytest.mark.parametrize(("kind", "message"), MESSAGES)
def test_types_are_those_of_the_protocol(kind: typing.Any, message: typing.Any) -> None:
    descriptor = message.DESCRIPTOR
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    assert list(fields) == [field.name for field in descriptor.fields]
    for field in descriptor.fields:
        optional = field.has_presence
        assert ("None" in fields[field.name]) == optional, field.name
    assert not hasattr(kind.from_proto(message()), "__dict__")
    assert set(kind.from_proto(message()).to_dict()) == set(fields)


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (types.Verdict, pb.Verdict),
        (types.Evidence, pb.Evidence),
        (types.CallState, pb.CallState),
        (types.FeedbackCode, pb.FeedbackCode),
    ],
)
def test_words_are_those_of_the_protocol(words: typing.Any, numbers: typing.Any) -> None:
    names = [value.name for value in numbers.DESCRIPTOR.values]
    prefix = names[0].removesuffix("UNSPECIFIED")
    assert [name.removeprefix(prefix) for name in names] == [word.name for word in words]
    assert all(word.value == word.name.lower() and str(word) == word.value for word in words)


def test_unknown_verdict_of_a_newer_daemon() -> None:
    report = types.Report.from_proto(pb.Report.FromString(b"\x30\x63"))
    assert report.verdict is types.Verdict.UNSPECIFIED


def test_intent_fields_are_those_of_the_protocol() -> None:
    assert set(pb.Intent.DESCRIPTOR.fields_by_name) == INTENT_FIELDS


class FakeRpcError(grpc.RpcError):
    def __init__(
        self, code: grpc.StatusCode, details: str, trailer: tuple[tuple[str, bytes], ...] = ()
    ) -> None:
        super().__init__()
        self._code, self._details, self._trailer = code, details, trailer

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> typing.Any:
        return self._trailer


@pytest.mark.parametrize(
    ("code", "field", "kind"),
    [
        ("UNAVAILABLE", "", errors.Unavailable),
        ("DEADLINE_EXCEEDED", "", errors.Unavailable),
        ("INVALID_ARGUMENT", "memory", errors.InvalidIntent),
        ("RESOURCE_EXHAUSTED", "", errors.Refused),
        ("FAILED_PRECONDITION", "", errors.Refused),
        ("FAILED_PRECONDITION", "session", errors.NotInSession),
        ("ALREADY_EXISTS", "id", errors.AlreadyExists),
        ("NOT_FOUND", "call_id", errors.CallNotFound),
        ("NOT_FOUND", "session_id", errors.NotFound),
        ("PERMISSION_DENIED", "", errors.PermissionDenied),
        ("UNAUTHENTICATED", "", errors.NotInSession),
        ("INTERNAL", "", errors.AgentcgError),
    ],
)
def test_errors_by_code(code: str, field: str, kind: type[errors.AgentcgError]) -> None:
    parts = pb.Error(code=code, field=field, value="v", allowed="a", sentence="As it is.")
    trailer = ((errors.ERROR_TRAILER, parts.SerializeToString()),)
    error = errors.from_rpc_error(FakeRpcError(grpc.StatusCode[code], "short", trailer))
    assert type(error) is kind
    assert str(error) == "As it is."
    assert error.to_dict() == {
        "code": code,
        "field": field,
        "value": "v",
        "allowed": "a",
        "sentence": "As it is.",
    }


def test_errors_without_or_with_a_broken_trailer() -> None:
    late = errors.from_rpc_error(FakeRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, "x"))
    assert str(late) == "agentcgroupd did not answer in time"
    stopped = errors.from_rpc_error(FakeRpcError(grpc.StatusCode.CANCELLED, "CANCELLED"))
    assert (type(stopped), stopped.code) == (errors.ConnectionLost, "UNAVAILABLE")
    broken = FakeRpcError(grpc.StatusCode.INTERNAL, "boom", ((errors.ERROR_TRAILER, b"\xff"),))
    assert str(errors.from_rpc_error(broken)) == "boom"


def test_finding_the_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / paths.LAUNCHER
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.delenv("AGENTCG_EXEC", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    paths._find.cache_clear()
    assert paths.find_launcher() == str(program)
    paths._find.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(errors.LauncherNotFound, match="pip install agentcgroup"):
        paths.find_launcher()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert paths.find_launcher() == str(program)
    paths._find.cache_clear()


def test_wait_status() -> None:
    assert results.wait_status(3) == 3 << 8
    assert results.wait_status(-9) == 9


def test_cut_argv() -> None:
    assert cut_argv(["a", "b"]) == ["a", "b"]
    cut = cut_argv(["x" * 4095, "ä", "never"])
    assert cut == ["x" * 4095, ""]


def test_syntax_is_that_of_python_3_10() -> None:
    sources = [path.read_text() for path in PACKAGE.rglob("*.py")]
    trees = [ast.parse(source, feature_version=(3, 10)) for source in sources]
    assert sum(len(tree.body) for tree in trees) > len(trees) > 20


def test_python_3_10_compiles_it(tmp_path: Path) -> None:
    python = shutil.which("python3.10")
    if python is None or subprocess.run([python, "-V"], capture_output=True).returncode:
        pytest.skip("no python3.10 here")
    sources = [str(path) for path in PACKAGE.rglob("*.py")]
    script = "import sys; print(len([compile(open(p).read(), p, 'exec') for p in sys.argv[1:]]))"
    done = subprocess.run([python, "-c", script, *sources], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{len(sources)}\n"), done.stderr


def test_answers_are_values() -> None:
    """Equal and hashed by what they hold, of the same kind alone, and shown as a dataclass is."""
    one = types.NetUsage(1, 2, 3, 4)
    assert one == types.NetUsage(1, 2, 3, 4) and hash(one) == hash(types.NetUsage(1, 2, 3, 4))
    assert one != types.NetUsage(1, 2, 3, 5) and one != (1, 2, 3, 4)
    assert types.Level.CALL != one
    shown = "receive_bytes=1, receive_packets=2, send_bytes=3, send_packets=4, refused_packets=0"
    assert repr(one) == f"NetUsage({shown})"
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.send_bytes = 5  # type: ignore[misc]
