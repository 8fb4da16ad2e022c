"""`agentcg doctor` on the kernel's programs: each feature tried for real, and taken back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentcgroupd.bpf import features, loader
from agentcgroupd.bpf.features import DEFINITIONS
from agentcgroupd.doctor import report
from agentcgroupd.doctor.diagnosis import Diagnosis, Feature, State
from tests.harness import ROOT
from tests.kernel.test_bpf_faults import is_there, mapped, owned

pytestmark = [
    pytest.mark.programs,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may load programs"),
]

NAMES = [definition.name for definition in DEFINITIONS]


def rows_of(diagnosis: Diagnosis) -> dict[str, Feature]:
    """Rows by name, none of which comes twice."""
    rows = {row.name: row for row in diagnosis.features}
    assert len(rows) == len(diagnosis.features)
    return rows


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    """The diagnosis of this kernel, which has given back all that it took."""
    before = owned(), mapped()
    found = report.run()
    assert (owned(), mapped()) == before
    return found


def test_every_feature_has_a_row(diagnosis: Diagnosis) -> None:
    assert [row.name for row in diagnosis.features if row.name in NAMES] == NAMES
    rows = rows_of(diagnosis)
    assert {"kernel types (BTF)", "sched_ext", "swap"} <= set(rows)
    swaps = Path("/proc/swaps").read_text().splitlines()[1:]
    assert (rows["swap"].state is State.WORKS) == bool(swaps)
    for definition in DEFINITIONS:
        row = rows[definition.name]
        assert row.state is not State.UNKNOWN
        assert row.fallback == definition.fallback
        assert row.reason and "\n" not in row.reason
        assert bool(row.remedy) == (row.state is State.MISSING), "each that is known has a remedy"


def test_the_rows_say_what_the_daemon_would_find(diagnosis: Diagnosis) -> None:
    rows, seen = rows_of(diagnosis), set()
    before = owned()
    for name in ("lifecycle", "memory"):
        bpf, states = features.load(name)
        seen |= owned() - before
        if bpf is not None:
            bpf.close()
        for state in states:
            row = rows[state.name]
            assert (row.state is State.WORKS) == state.works
            if state.works:
                assert row.reason == f"the kernel took {', '.join(state.programs)}"
            else:
                assert (row.reason, row.remedy) == (state.reason, state.remedy)
    assert seen, "programs were loaded here, so doctor's were too"


def test_what_it_loads_is_seen_and_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attached while it looks: the kernel's own list of what this process holds says so."""
    held: set[tuple[str, int]] = set()
    attach = loader.BpfObject.attach

    def watched(self: loader.BpfObject, *names: str) -> None:
        attach(self, *names)
        held.update(owned())

    monkeypatch.setattr(loader.BpfObject, "attach", watched)
    before = owned()
    works = {row.name for row in report.run().features if row.state is State.WORKS}
    links = {item for item in held - before if item[0] == "link"}
    attached = [d for d in DEFINITIONS if d.object in ("lifecycle", "memory")]
    programs = {p for d in attached if d.name in works for p in d.ways[0].programs}
    assert len(links) >= len(programs) > 0
    assert not any(map(is_there, links))
    assert owned() == before


def test_the_table_and_the_json(diagnosis: Diagnosis) -> None:
    table = diagnosis.render()
    data = json.loads(json.dumps(diagnosis.to_dict()))
    found = {row["name"]: row for row in data["features"]}
    for name in NAMES:
        row = found[name]
        assert set(row) == {"name", "state", "reason", "remedy", "fallback"}
        (line,) = (text for text in table.splitlines() if f"  {name}  " in text)
        assert line.startswith("ok" if row["state"] == "works" else "--")
        assert line.endswith(row["reason"])
        if row["state"] == "missing":
            assert f"instead: {row['fallback']}" in table and f"to do: {row['remedy']}" in table


def test_an_incomplete_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "OBJECTS", tmp_path)
    rows = rows_of(report.run())
    for definition in DEFINITIONS:
        if definition.object not in ("memcg_ops", "sched"):  # not even looked for without types
            row = rows[definition.name]
            assert row.state is State.MISSING
            assert f"{tmp_path}/{definition.object}.bpf.o is not there" in row.reason
            assert row.remedy == "install the daemon and its programs again, from one release"


# --- In other processes: each takes seconds in the guest, with the same result --------------------


def diagnosed_by(*command: str) -> dict[str, Any]:
    """The rows of doctor in a process that is started by `command`."""
    code = (
        "import json; from agentcgroupd.doctor.report import run; "
        "print(json.dumps(run().to_dict()))"
    )
    argv = [*command, sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return {row["name"]: row for row in json.loads(done.stdout)["features"]}


@pytest.mark.full_speed
def test_only_root_can_try() -> None:
    """For another user features are unknown, not missing. The process may read every file, so that
    it finds its own modules."""
    nobody = ("--reuid=65534", "--regid=65534", "--clear-groups")
    may_read = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    rows = diagnosed_by("setpriv", *nobody, *may_read)
    for name in NAMES:
        assert rows[name]["state"] == "unknown"
        assert rows[name]["reason"] == "only root can try"
        assert rows[name]["remedy"] == "run `agentcg doctor` as root"


@pytest.mark.full_speed
def test_a_kernel_without_types() -> None:
    """The file with the kernel's types is hidden in a mount namespace."""
    hide = 'mount -t tmpfs none /sys/kernel/btf && exec "$@"'
    rows = diagnosed_by("unshare", "--mount", "sh", "-c", hide, "sh")
    assert rows["kernel types (BTF)"]["state"] == "missing"
    for name in NAMES:
        assert rows[name]["state"] == "missing"
        assert rows[name]["reason"].startswith("types of the running kernel: ")
        if name != features.RECLAIM_HOOKS:
            assert rows[name]["remedy"] == "use a kernel with CONFIG_DEBUG_INFO_BTF"


@pytest.mark.full_speed
def test_the_command() -> None:
    command = str(Path(sys.executable).with_name("agentcg-cli"))
    done = subprocess.run([command, "doctor", "--json"], stdout=subprocess.PIPE, check=False)
    data = json.loads(done.stdout)
    assert done.returncode == (0 if data["ok"] else 1)
    assert [row["name"] for row in data["features"] if row["name"] in NAMES] == NAMES
