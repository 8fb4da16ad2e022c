"""Steps of a process tree, from what strace(1) has written of each process."""

from __future__ import annotations

from pathlib import Path

from tests.trees.recorded import played
from tests.trees.strace import Reader

CHILD = "clone(child_stack=NULL, flags=CLONE_CHILD_CLEARTID|CLONE_CHILD_SETTID|SIGCHLD, x=0) = {}"
THREAD = "clone3({{flags=CLONE_VM|CLONE_FILES|CLONE_THREAD|CLONE_SETTLS, x=0}}, 88) = {}"
WAITED = "wait4(-1, [{WIFEXITED(s) && WEXITSTATUS(s) == 0}], 0, NULL) = 11"


def executed(file: str, argv: str) -> str:
    return f'execve("{file}", {argv}, 0x7ffd /* 20 vars */) = 0'


def test_what_each_process_does_is_in_its_order() -> None:
    lines = {
        10: [
            executed("/nowhere/agent", '["agent", "say \\"x\\"\\n", "\\303\\244"]'),
            'execve("/nowhere/none", ["none"], 0x1 /* 1 var */) = -1 ENOENT (No such file)',
            CHILD.format(11),
            CHILD.format(12),
            WAITED,
            WAITED,
            "vfork() = 13",
            THREAD.format(14),
        ],
        11: ["setpgid(0, 11) = 0", executed("/nowhere/ls", '["ls"]')],
        12: ["setpgid(0, 11) = 0", executed("/nowhere/wc", '["wc", "-l"]')],
        13: ["setsid() = 13", executed("/nowhere/make", '["make"]')],
        14: [CHILD.format(15)],
        15: [executed("/nowhere/rg", '["rg"]')],
    }
    steps = Reader(lines).steps(10)
    assert steps == [
        ["exec", "agent", ["agent", 'say "x"\n', "ä"]],
        ["fork", [["group"], ["exec", "ls", ["ls"]]]],
        ["fork", [["join"], ["exec", "wc", ["wc", "-l"]]]],
        ["wait"],
        ["spawn", [["setsid"], ["exec", "make", ["make"]]]],
        ["thread", [["exec", "rg", ["rg"]]]],
    ]
    words = played(steps)
    assert words[:5] == ["exec", "agent", "3", "agent", 'say "x"\n']
    assert words.count("fork") == 2 and words.count("spawn") == words.count("thread") == 1


def test_a_script_has_the_arguments_that_its_interpreter_gets(tmp_path: Path) -> None:
    script = tmp_path / "aider"
    script.write_text("#!/usr/bin/env python3 -u\npass\n")
    steps = Reader({1: [executed(str(script), '["aider", "--yes"]')]}).steps(1)
    argv = ["/usr/bin/env", "python3 -u", str(script), "--yes"]
    assert steps == [["exec", "aider", argv]]
