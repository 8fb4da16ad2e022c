"""The diagnosis of a host: what it says as a whole, and that it needs no more than the SDK."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from agentcgroupd.doctor.diagnosis import CALL_CGROUPS, MEMORY_LIMITS, Diagnosis, Feature, State
from agentcgroupd.doctor.disks import disk_features

OPTIONAL = ("pydantic", "prometheus_client", "grpc_health", "grpc_reflection", "pynvml")


def diagnosed(**states: State) -> Diagnosis:
    rows = [Feature(CALL_CGROUPS, states["cgroups"], ""), Feature("swap", State.MISSING, "none")]
    if "memory" in states:
        rows.append(Feature(MEMORY_LIMITS, states["memory"], "", "boot with it", "no limit"))
    return Diagnosis("7.3.4", "/sys/fs/cgroup", tuple(rows))


@pytest.mark.parametrize(
    ("cgroups", "memory", "ok", "words"),
    [
        (State.WORKS, State.WORKS, True, "can do its work here: 2 of 3 features work"),
        (State.WORKS, State.MISSING, False, "for want of memory limits: 1 of 3 features work"),
        (State.MISSING, State.MISSING, False, "for want of call cgroups and memory limits"),
        (State.UNKNOWN, State.UNKNOWN, False, "may not be able .* as root to know.* 2 are not kno"),
    ],
)
def test_the_summary(cgroups: State, memory: State, ok: bool, words: str) -> None:
    diagnosis = diagnosed(cgroups=cgroups, memory=memory)
    assert diagnosis.ok is ok
    last = diagnosis.render().splitlines()[-1]
    assert last == diagnosis.summary == diagnosis.to_dict()["summary"]
    assert last.startswith("agentcgroup ") and re.search(words, last)


def test_what_was_not_tried_does_not_work() -> None:
    assert not diagnosed(cgroups=State.WORKS).ok


def test_it_needs_no_more_than_the_sdk() -> None:
    code = (
        "import sys\n"
        f"for name in {OPTIONAL!r}: sys.modules[name] = None\n"
        "from agentcgroup.cli import main\n"
        "code = main(['doctor'])\n"
        "assert code in (0, 1), code"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("kernel ")
    assert "agentcgroup" in done.stdout.splitlines()[-1]


def features_of_disks(root: Path) -> dict[str, Feature]:
    mount, sys_block = root / "cgroup", root / "block"
    return {feature.name: feature for feature in disk_features(mount, sys_block)}


def test_what_is_kept_of_disks(tmp_path: Path) -> None:
    disks, leaf = tmp_path / "block", tmp_path / "cgroup/leaf"
    leaf.mkdir(parents=True)
    assert features_of_disks(tmp_path)["shares of disks"].state is State.MISSING
    assert features_of_disks(tmp_path)["latency of disks"].state is State.UNKNOWN
    for name, scheduler in (("sda", "none [bfq]"), ("sdb", "[none] bfq")):
        (disks / name / "queue").mkdir(parents=True)
        (disks / name / "queue/scheduler").write_text(f"{scheduler}\n")
    (disks / "going").mkdir()
    qos = "999:7 enable=1 ctrl=auto\n999:8 enable=0 ctrl=auto\n"
    (tmp_path / "cgroup/io.cost.qos").write_text(qos)
    (leaf / "io.stat").touch()
    shares = features_of_disks(tmp_path)["shares of disks"]
    assert shares.state is State.WORKS
    assert shares.reason == "weights count on 999:7 (io.cost), sda (bfq)"
    assert features_of_disks(tmp_path)["latency of disks"].state is State.MISSING
    (leaf / "io.latency").touch()
    assert features_of_disks(tmp_path)["latency of disks"].state is State.WORKS
