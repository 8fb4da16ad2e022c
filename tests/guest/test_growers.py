"""Programs that abort when memory is refused live through a thousand urgent denials beside them.

Go, V8 and most C++ programs end when the kernel gives them no memory. They have not asked to be
refused, so the urgent reaction must not refuse them. That the denials are real is shown by the same
program in a call that has asked for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agentcgroupd.cgroup import knobs
from agentcgroupd.cgroup.tree import Cgroup
from tests.guest.test_memory_programs import MIB, Tree, tree
from tests.harness import PATIENCE, wait_until

__all__ = ["tree"]
pytestmark = [pytest.mark.controllers, pytest.mark.programs]

DENIALS = 1000
EACH_USEC = 2_000
C_GROWER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Waits for a byte; then takes 40 times 4 MiB and keeps them. Aborts where it is refused. */
int main(void)
{
	char byte;

	if (write(1, "ready\n", 6) != 6 || read(0, &byte, 1) != 1)
		return 1;
	for (int n = 0; n < 40; n++) {
		char *held = malloc(4 << 20);

		if (!held)
			abort();
		memset(held, 1, 4 << 20);
		usleep(20000);
	}
	return 0;
}
"""
GO_GROWER = """
package main

import (
	"os"
	"time"
)

var held [][]byte

func main() {
	os.Stdout.WriteString("ready\\n")
	os.Stdin.Read(make([]byte, 1))
	for n := 0; n < 40; n++ {
		part := make([]byte, 4<<20)
		for i := 0; i < len(part); i += 4096 {
			part[i] = 1
		}
		held = append(held, part)
		time.Sleep(20 * time.Millisecond)
	}
}
"""
NODE_GROWER = """
const fs = require("fs");
fs.writeSync(1, "ready\\n");
fs.readSync(0, Buffer.alloc(1));
const held = [];
for (let n = 0; n < 40; n++) {
  held.push(Buffer.alloc(4 << 20, 1));
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20);
}
"""


def build_c(directory: Path) -> list[str]:
    """Compile the grower in C."""
    (directory / "grower.c").write_text(C_GROWER)
    program = directory / "grower"
    subprocess.run(["cc", "-O1", "-o", program, directory / "grower.c"], check=True)
    return [str(program)]


def build_go(directory: Path) -> list[str]:
    """Compile the grower in Go."""
    if shutil.which("go") is None:
        pytest.skip("no Go compiler (Debian: golang-go)")
    (directory / "grower.go").write_text(GO_GROWER)
    program = directory / "grower"
    own = {"HOME": str(directory), "GOCACHE": str(directory / "cache"), "GOFLAGS": "-p=1"}
    argv = ["go", "build", "-o", str(program), str(directory / "grower.go")]
    subprocess.run(argv, check=True, env={**os.environ, **own})
    return [str(program)]


def write_node(directory: Path) -> list[str]:
    """Write the grower in JavaScript."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node (Debian: nodejs)")
    (directory / "grower.js").write_text(NODE_GROWER)
    return [node, str(directory / "grower.js")]


def start(argv: list[str], cgroup: Cgroup, output: Path) -> subprocess.Popen[bytes]:
    """Start a grower in a cgroup; it waits."""
    enter = 'echo $$ > "$0" && exec "$@"'
    with output.open("wb") as out:
        grower = subprocess.Popen(
            ["sh", "-c", enter, str(cgroup.path / "cgroup.procs"), *argv],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    wait_until("it is ready", lambda: b"ready" in output.read_bytes(), 60)
    return grower


def grow_while_denied(tree: Tree, grower: subprocess.Popen[bytes]) -> tuple[int, int | None]:
    """Have the program deny growth for an important session again and again, with a grower that
    begins at the first time; returns how often, and the grower's exit status."""
    tree.memory.protect([(tree.sessions["vip"].id, 80)], tree.pool.id)
    # As the program notes it when a session of this priority stalls.
    tree.memory.control.urgent_priority = 80
    assert grower.stdin is not None
    denials, deadline = 0, time.monotonic() + 90 * PATIENCE
    while denials < DENIALS or grower.poll() is None:
        # Each one lasts until the next.
        tree.memory.confirm_urgent(1_000_000)
        denials += 1
        if denials == 1:
            grower.stdin.write(b"x")
            grower.stdin.close()
        time.sleep(EACH_USEC / 1e6)
        assert time.monotonic() < deadline
    return denials, grower.poll()


@pytest.mark.parametrize("make", [build_c, build_go, write_node])
def test_who_never_asked_for_it_lives(
    tree: Tree, tmp_path: Path, make: Callable[[Path], list[str]]
) -> None:
    call, output = tree.calls["batch"], tmp_path / "out"
    grower = start(make(tmp_path), call, output)
    denials, status = grow_while_denied(tree, grower)
    assert denials >= DENIALS and status == 0, output.read_text()[-2000:]
    state = tree.memory.state(call.id)
    assert state is not None and state.denied == 0
    assert call.read(knobs.MEMORY_PEAK) > 160 * MIB


def test_the_same_program_ends_where_it_asked_for_it(tree: Tree, tmp_path: Path) -> None:
    call = tree.calls["batch"]
    tree.memory.set_willing(call.id, True)
    grower = start(build_c(tmp_path), call, tmp_path / "out")
    _, status = grow_while_denied(tree, grower)
    assert status == -6, "SIGABRT"
    state = tree.memory.state(call.id)
    assert state is not None and state.denied >= 1
