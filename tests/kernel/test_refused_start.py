"""A start that is refused says why in one line, and leaves nothing behind."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agentcgroupd.cgroup.tree import cgroup2_mount

pytestmark = pytest.mark.full_speed

CONFIG = """\
[pool]
cgroup = "{pool}"
{more}
[server]
run_dir = "{directory}/run"
metrics_address = "{address}"
[audit]
path = "{directory}/log/more/audit.jsonl"
[bpf]
enabled = false
[cpu]
scheduler = "off"
"""


def _start(directory: Path, pool: str, address: str = "", more: str = "", *options: str) -> str:
    """Start a daemon that has to refuse; returns the last line that it says."""
    file = directory / "c.toml"
    text = CONFIG.format(pool=pool, directory=directory, address=address, more=more)
    file.write_text(text)
    command = [sys.executable, "-m", "agentcgroupd", "--config", str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 78, (done.stdout, done.stderr)
    assert list(directory.iterdir()) == [file], "nothing is left"
    return done.stderr.splitlines()[-1]


def test_a_port_that_is_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = _start(tmp_path, f"/agentcg-{tmp_path.name[-20:]}", address)
    assert f"server.metrics_address: '{address}' cannot be used: Address already in use" in said
    assert not (cgroup2_mount() / f"agentcg-{tmp_path.name[-20:]}").exists()


@pytest.mark.parametrize("options", [(), ("--check",)])
def test_a_pool_whose_parent_is_not_there(tmp_path: Path, options: tuple[str, ...]) -> None:
    said = _start(tmp_path, "/no-such.slice/pool", "", "", *options)
    assert "pool.cgroup: '/no-such.slice/pool' cannot be used: its parent" in said
    assert "make it with mkdir, have systemd make it" in said


@pytest.mark.parametrize("options", [(), ("--check",)])
def test_a_mistake_in_the_file(tmp_path: Path, options: tuple[str, ...]) -> None:
    said = _start(tmp_path, "/x", "", 'memory_mx = "1G"', *options)
    assert said.endswith(
        f"{tmp_path}/c.toml:3: pool.memory_mx: no such key; did you mean 'memory_max'?"
    )
