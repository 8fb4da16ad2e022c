"""`@tool`: a function whose every invocation is a call of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, Protocol, TypeVar, overload

from agentcgroup.aio import AsyncAgent, AsyncCall
from agentcgroup.client import Agent, Call
from agentcgroup.intent import Intent, intent_message

if TYPE_CHECKING:
    from typing_extensions import ParamSpec, Unpack

    P = ParamSpec("P")
else:
    from typing import ParamSpec

    P = ParamSpec("P")

R = TypeVar("R")


class ToolDecorator(Protocol):
    """A decorator that takes the call off the front of a function's parameters, sync or async."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[AsyncCall, P], Coroutine[Any, Any, R]], /
    ) -> Callable[P, Coroutine[Any, Any, R]]: ...

    @overload
    def __call__(self, function: Callable[Concatenate[Call, P], R], /) -> Callable[P, R]: ...


@functools.cache
def default_agent() -> Agent:
    """Return the agent that `@tool` uses where none is given."""
    return Agent()


@functools.cache
def default_async_agent() -> AsyncAgent:
    """Return the agent that `@tool` uses for coroutines where none is given."""
    return AsyncAgent()


@overload
def tool(
    function: Callable[Concatenate[AsyncCall, P], Coroutine[Any, Any, R]], /
) -> Callable[P, Coroutine[Any, Any, R]]: ...


@overload
def tool(function: Callable[Concatenate[Call, P], R], /) -> Callable[P, R]: ...


@overload
def tool(
    *,
    name: str | None = None,
    agent: Agent | AsyncAgent | None = None,
    **intent: Unpack[Intent],
) -> ToolDecorator: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    agent: Agent | AsyncAgent | None = None,
    **intent: Unpack[Intent],
) -> Any:
    """Make each invocation of a function a call, which the function gets as its first argument.

    Callers do not pass the call:

        @tool(memory="512M")
        def run_tests(call: Call, path: str) -> str:
            return str(call.run(["pytest", path], capture_output=True, text=True).stdout)

        run_tests("tests/unit")

    A coroutine function gets an `AsyncCall`. Others see the signature without the call, so that an
    agent framework makes the right schema of it. Without an intent `@tool` needs no parentheses.

    Args:
        name: the tool's name; else the function's.
        agent: the owner of the calls; else one made at first use with the defaults of `Agent`.
        **intent: what each call may use: the fields of `Intent`.

    Raises:
        TypeError: the function has no parameter for the call, the agent is of the other kind, or
            there is no such field of an intent. All of this is said when the function is decorated.
        InvalidIntent: a field is neither text nor a number.
    """
    intent_message(intent)  # for its errors

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        return _decorated(function, name or function.__name__, agent, intent)

    return decorate if function is None else decorate(function)


def _decorated(
    function: Callable[..., Any], called: str, agent: Agent | AsyncAgent | None, intent: Intent
) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):
        _check_first(function, "AsyncCall")
        if isinstance(agent, Agent):
            raise TypeError(f"{called} is a coroutine function: its agent is an AsyncAgent")

        @functools.wraps(function)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            owner = agent if isinstance(agent, AsyncAgent) else default_async_agent()
            async with owner.tool_call(called, **intent) as call:
                return await function(call, *args, **kwargs)

        return _without_call(run_async, function)
    _check_first(function, "Call")
    if isinstance(agent, AsyncAgent):
        raise TypeError(f"{called} is no coroutine function: its agent is an Agent")

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        owner = agent if isinstance(agent, Agent) else default_agent()
        with owner.tool_call(called, **intent) as call:
            return function(call, *args, **kwargs)

    return _without_call(run, function)


def _check_first(function: Callable[..., Any], kind: str) -> None:
    """Refuse a function whose first parameter is not for a call. Raises TypeError."""
    name = getattr(function, "__name__", repr(function))
    wanted = f"the first parameter of a tool gets the call, as in: def {name}(call: {kind}, ...)"
    first = next(iter(inspect.signature(function).parameters.values()), None)
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        raise TypeError(f"{name} has no parameter for its call; {wanted}")
    annotation = first.annotation
    if annotation is first.empty or first.kind is first.VAR_POSITIONAL:
        return
    # Under `from __future__ import annotations` it is text.
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    if text.strip("\"'").rpartition(".")[2] not in (kind, "CallBase", "Any", "object"):
        raise TypeError(f"{name}: its first parameter {first} is for something else; {wanted}")


def _without_call(wrapper: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)
    first, *rest = signature.parameters.values()
    wrapper.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
    hidden = {first.name} - {parameter.name for parameter in rest}
    wrapper.__annotations__ = {
        key: value for key, value in function.__annotations__.items() if key not in hidden
    }
    return wrapper
