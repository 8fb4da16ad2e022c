"""Which programs begin a call, and what it is called: decided from a name and arguments alone."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.boundaries.rules import OWN_LAUNCHERS, Rules, Started, argv_of
from agentcgroupd.bpf import abi
from agentcgroupd.config import parse_config
from agentcgroupd.config_boundaries import SHELL_COMMANDS, BoundariesConfig, BoundaryRule
from agentcgroupd.errors import ConfigError
from agentcgroupd.intents.command import tool_name
from agentcgroupd.intents.parse import NAME_CHARS_MAX, check_name

SHELLS_ONLY = BoundariesConfig(rules=(SHELL_COMMANDS,))
ARGUMENTS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
EDGE = int(abi.ABI_ARGV_BYTES)
PLAIN_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def begins_call(config: BoundariesConfig, comm: str, argv: list[str]) -> bool:
    """Whether a program of that name begins a call, whoever has started it."""
    return Rules(config).of(Started(comm, argv)).begins_call


# --- Arguments ------------------------------------------------------------------------------------


def exec_event(argv: list[str]) -> abi.ExecEvent:
    """The event that on_exec in lifecycle.bpf.c would send."""
    raw = b"".join(word.encode() + b"\0" for word in argv)
    kept = raw[: abi.ABI_ARGV_BYTES]
    event = abi.ExecEvent(argv_bytes=len(kept), argv_cut=len(raw) > len(kept))
    event.argv[: len(kept)] = list(kept)
    return event


@given(ARGUMENTS)
def test_arguments_come_back_whole_or_cut_at_the_end(argv: list[str]) -> None:
    event = exec_event(argv)
    found = argv_of(event)
    if not event.argv_cut:
        assert found == argv
        return
    assert found[:-1] == argv[: len(found) - 1]
    # A character may have been cut in two.
    assert argv[len(found) - 1].startswith(found[-1].rstrip("\ufffd"))
    assert len("\0".join(found).encode()) >= abi.ABI_ARGV_BYTES - 4


@pytest.mark.parametrize(
    ("argv", "cut"),
    [
        ([], False),
        ([""], False),
        (["", "", ""], False),
        (["x" * (EDGE - 1)], False),
        (["x" * EDGE], True),
        (["x" * (EDGE - 2), ""], False),
        (["x" * (EDGE - 1), ""], True),
        (["bash", "-c", "y" * 1000, "last"], True),
    ],
)
def test_arguments_at_the_edge_of_the_event(argv: list[str], cut: bool) -> None:
    event = exec_event(argv)
    found = argv_of(event)
    assert bool(event.argv_cut) is cut
    if not cut:
        assert found == argv
    else:
        assert "\0".join(found) == "\0".join(argv)[: abi.ABI_ARGV_BYTES]


def test_bytes_that_are_no_text_do_not_hide_the_others() -> None:
    event = abi.ExecEvent(argv_bytes=8)
    event.argv[:8] = list(b"a\0\xff\xfe\0c\0\0")
    assert argv_of(event) == ["a", "\ufffd\ufffd", "c", ""]


def test_arguments_that_could_not_be_read_are_none() -> None:
    assert argv_of(abi.ExecEvent(argv_bytes=0)) == []


# --- The call's name ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("make -j4", "make"),
        ("/usr/bin/python3 -m pytest", "python3"),
        ("LANG=C LC_ALL=C sort file", "sort"),
        ("2=3 x", "2=3"),  # no assignment: no name begins with a digit
        ("a==b", "bash"),  # assigns, and runs nothing
        ("(cd /x && ls)", "ls"),
        ("ls;true", "ls"),
        ("sleep& wait", "sleep"),
        ("cd x && pytest -q", "pytest"),
        ("cd /tmp; pwd", "pwd"),
        ("cd /tmp && timeout 10 sleep 0.3", "sleep"),
        ("cd /tmp", "cd"),
        ("source venv/bin/activate && exec python3 -m app", "python3"),
        ("FOO=1 env -u HOME BAR=2 make", "make"),
        ("sudo -u bob -E nice -n 5 timeout -k 1s 10 make", "make"),
        ("time -f %e nohup setsid stdbuf -oL make &", "make"),
        ("exec -a other make", "make"),
        ("nohup sleep 3 >/dev/null 2>&1 & echo started", "sleep"),
        ("timeout 5 bash -c 'cd x && make'", "make"),
        ("xargs -n 1 -I {} gcc {}", "gcc"),
        ("taskset 0x3 make", "make"),
        ("if [ -f x ]; then make; fi", "make"),
        ("while read -r x; do gcc $x; done", "gcc"),
        ("echo $(make -s)", "make"),
        ("eval 'cd x; make'", "make"),
        ('eval "$(ssh-agent -s)"; make', "make"),
        ('eval ""', "bash"),
        ("/usr/bin/env bash -c make", "make"),
        ("cat <<'X' | sh\nsleep 1\nX", "sh"),
        ("# a comment\nls", "ls"),
        ("'/opt/my tools/run me' now", "run me"),
        ("echo 'it is not closed", "echo"),
        ("", "bash"),
        ("   \n\t", "bash"),
        ("/", "bash"),
        ("{ ls; }", "ls"),
        ("x" * 1000, "x" * NAME_CHARS_MAX),
    ],
)
def test_a_script_is_called_by_its_first_command(script: str, name: str) -> None:
    assert tool_name("bash", ["bash", "-c", script]) == name
    assert tool_name("bash", ["bash", "-lc", script, "$0", "$1"]) == name


@pytest.mark.parametrize(
    ("comm", "argv", "name"),
    [
        ("bash", ["bash", "script.sh", "make"], "bash"),
        ("bash", ["bash", "-c"], "bash"),
        ("bash", ["bash", "-x", "make"], "bash"),
        ("pytest", [], "pytest"),
        ("", [], "tool"),
        ("a/b", ["a/b"], "b"),
    ],
)
def test_others_are_called_by_their_program(comm: str, argv: list[str], name: str) -> None:
    assert tool_name(comm, argv) == name


@given(comm=PLAIN_TEXT, argv=st.lists(PLAIN_TEXT), script=PLAIN_TEXT)
def test_every_name_is_one_that_could_have_been_declared(
    comm: str, argv: list[str], script: str
) -> None:
    for words in (argv, [comm, "-c", script, *argv]):
        name = tool_name(comm, words)
        assert check_name(name) == name


@pytest.mark.parametrize("script", ["'a\nb'", "\x1b[31mred", "a\x07"])
def test_no_name_holds_control_characters(script: str) -> None:
    name = tool_name("bash", ["bash", "-c", script])
    assert check_name(name) == name


def test_options_after_c_are_not_the_script() -> None:
    """Some agents start a login shell in this way."""
    assert tool_name("zsh", ["zsh", "-c", "-l", "make all"]) == "make"


def _claude(command: str) -> str:
    return (
        "source /home/u/.claude/shell-snapshots/snapshot-bash-17-ab.sh 2>/dev/null || true && "
        "\\builtin shopt -u extglob 2>/dev/null || true && { \\builtin unalias -- 'which'; "
        "\\builtin unset -f -- 'which'; } >/dev/null 2>&1 || true && "
        f"eval {shlex.quote(command)} < /dev/null && pwd -P >| /tmp/claude-1eb4-cwd"
    )


def _codex(command: str) -> str:
    saved = "".join(
        f'__CODEX_SNAPSHOT_OVERRIDE_SET_{n}="${{VARIABLE_{n}+x}}"\n'
        f'__CODEX_SNAPSHOT_OVERRIDE_{n}="${{VARIABLE_{n}-}}"\n'
        for n in range(6)
    )
    return (
        f"{saved}\nif . '/home/u/.codex/snapshot' >/dev/null 2>&1; then :; fi\n"
        f'if [ -n "$__CODEX_SNAPSHOT_OVERRIDE_SET_0" ]; then export VARIABLE_0="x"; '
        f"else unset VARIABLE_0; fi\n\nexec '/bin/bash' -c {shlex.quote(command)}"
    )


@pytest.mark.parametrize("wrap", [_claude, _codex])
@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("pytest -q tests | tail -5", "pytest"),
        ("cd sub && FOO='a b' python3 -c \"import time; print('x')\"", "python3"),
        ("pwd", "pwd"),
        ("echo it\\'s; make all", "make"),
    ],
)
def test_what_agents_wrap_a_command_in_is_not_its_name(
    wrap: Callable[[str], str], command: str, name: str
) -> None:
    assert tool_name("bash", ["/bin/bash", "-c", "-l", wrap(command)]) == name
    assert tool_name("bash", ["bash", "-lc", wrap(command)]) == name


def test_only_a_shell_has_a_script() -> None:
    assert tool_name("python3", ["python3", "-c", "import time"]) == "python3"


# --- Rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELL_COMMANDS.program)
@pytest.mark.parametrize(
    ("argv", "begins"),
    [
        (["-c", "ls"], True),
        (["-lc", "ls"], True),
        (["-euxc", "ls"], True),
        (["script.sh"], False),
        (["c"], False),
        (["-l"], False),
        (["-i", "-c", "ls"], True),
        (["-c", "-l", "ls"], True),
        (["-o", "pipefail", "-c", "ls"], True),
        (["-eo", "pipefail", "-c", "ls"], True),
        (["--rcfile", "x", "-c", "ls"], True),
        (["--norc", "script.sh"], False),
        (["+c", "script.sh"], False),
        (["script.sh", "-c"], False),
        (["-c"], False),
        (["-c", "--", "ls"], True),
        ([""], False),
        ([], False),
    ],
)
def test_a_shells_commands_begin_calls(shell: str, argv: list[str], begins: bool) -> None:
    assert begins_call(SHELLS_ONLY, shell, [shell, *argv]) is begins


@pytest.mark.parametrize("comm", ["python3", "BASH", "bash2", "rbash", "", "sh "])
def test_nothing_else_does(comm: str) -> None:
    assert not begins_call(SHELLS_ONLY, comm, [comm, "-c", "ls"])
    assert not begins_call(SHELLS_ONLY, comm, [])


def test_the_first_rule_that_fits_decides() -> None:
    rules = [
        {"program": ["python3"], "first_argument": "-m", "begins_call": False},
        {"program": ["python*", "node"]},
        {"program": ["node"], "begins_call": False},
        {"program": ["git"], "first_argument": ""},
    ]
    config = parse_config({"boundaries": {"rules": rules}}).boundaries
    assert not begins_call(config, "python3", ["python3", "-m", "agent"])
    assert begins_call(config, "python3", ["python3", "x.py"])
    assert begins_call(config, "python3.12", ["python3.12", "-m", "agent"])
    assert begins_call(config, "node", ["node"])
    assert begins_call(config, "git", ["git"])
    assert not begins_call(config, "git", ["git", "status"])
    # The rules take the place of the default ones.
    assert not begins_call(config, "bash", ["bash", "-c", "ls"])


_WORDS = st.sampled_from(["", "a", "ab", "-c", "agentcg", "agentcg-exec"])
_GLOBS = st.sampled_from(["", "*", "a", "a*", "?b", "[!a]*", "-*c", "agentcg*"])
_RULES = st.lists(
    st.builds(
        BoundaryRule,
        program=st.lists(_GLOBS.filter(bool), max_size=3).map(tuple),
        first_argument=_GLOBS,
        begins_call=st.booleans(),
    ),
    max_size=4,
)


@given(rules=_RULES, comm=_WORDS, arguments=st.lists(_WORDS, max_size=3))
def test_rules_are_tried_in_order(
    rules: list[BoundaryRule], comm: str, arguments: list[str]
) -> None:
    """Each rule alone says whether it fits; together they say what the first of these says."""
    argv = [comm, *arguments]

    def fits(rule: BoundaryRule) -> bool:
        alone = (rule.model_copy(update={"begins_call": True}),)
        return begins_call(BoundariesConfig(rules=alone), comm, argv)

    fitting = [rule for rule in rules if fits(rule)]
    expected = fitting[0].begins_call if fitting else False
    assert begins_call(BoundariesConfig(rules=tuple(rules)), comm, argv) is expected


@pytest.mark.parametrize("launcher", OWN_LAUNCHERS)
def test_our_own_launchers_never_begin_a_call(launcher: str) -> None:
    """Launchers ask for a call themselves; two would be one too many."""
    everything = BoundariesConfig(rules=(BoundaryRule(program=("*",)),))
    assert begins_call(everything, f"{launcher}x"[:15], [])
    assert not begins_call(everything, launcher, [launcher, "--", "sh", "-c", "ls"])
    # The kernel's name for a program ends after 15 characters.
    assert len(launcher) <= abi.ABI_COMM_BYTES - 1


# --- The configuration ----------------------------------------------------------------------------


def rules(*rules: dict[str, object]) -> dict[str, object]:
    """The section with these rules."""
    return {"rules": list(rules)}


GOOD: dict[str, object] = {"program": ["x"]}


@pytest.mark.parametrize(
    ("boundaries", "words"),
    [
        ({"rule": []}, "rule: no such key; did you mean 'rules'"),
        ({"enabled": "maybe"}, "enabled: 'maybe' cannot be used"),
        ({"rules": "bash"}, "rules: 'bash' cannot be used"),
        ({"rules": {"program": ["x"]}}, "rules: a table cannot be used; allowed is an array"),
        (rules({"program": "bash"}), "rules[0].program: 'bash' cannot be used"),
        (rules({"first_argument": "x"}), "rules[0].program: "),
        (rules(GOOD, {"program": [1]}), "rules[1].program[0]: 1 cannot be used"),
        (rules(GOOD | {"first_argument": 3}), "rules[0].first_argument: 3 cannot be used"),
        (
            rules(GOOD | {"begins_call": "perhaps"}),
            "rules[0].begins_call: 'perhaps' cannot be used",
        ),
        (
            rules(GOOD | {"argument": "-c"}),
            "rules[0].argument: no such key; did you mean 'first_argument'",
        ),
    ],
)
def test_mistakes_in_the_rules_are_named(boundaries: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"boundaries": boundaries}, "here.toml")
    assert str(caught.value).startswith(f"here.toml: boundaries.{words}")
