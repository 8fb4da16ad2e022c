"""The manifests for Kubernetes: right by its schema, and no more rights than the unit has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from agentcgroupd.config import load_config
from agentcgroupd.units import parse_bytes

ROOT = Path(__file__).parents[3]
BASE = ROOT / "deploy/kubernetes/base"
UNIT = (ROOT / "systemd/agentcgroupd.service").read_text()
KUSTOMIZATION = yaml.safe_load((BASE / "kustomization.yaml").read_text())
OLDEST = "1.30"
"""The release that knows `appArmorProfile`, the newest of what is used."""
VERSIONS = [OLDEST, kubernetes_validate.latest_version()]


def manifests() -> dict[str, Any]:
    """The objects that kustomize is told of, by their kind."""
    found = [yaml.safe_load((BASE / name).read_text()) for name in KUSTOMIZATION["resources"]]
    return {one["kind"]: one for one in found}


POD = manifests()["DaemonSet"]["spec"]["template"]["spec"]
CONTAINERS = [*POD["initContainers"], *POD["containers"]]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", sorted(manifests()))
def test_the_schema_holds(kind: str, version: str) -> None:
    kubernetes_validate.validate(manifests()[kind], version, strict=True)


def test_all_files_are_used() -> None:
    used = {*KUSTOMIZATION["resources"], "kustomization.yaml"}
    for generator in KUSTOMIZATION["configMapGenerator"]:
        used |= {*generator["files"]}
    assert {path.name for path in BASE.iterdir()} == used


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda one: str(one["name"]))
def test_its_rights_are_those_of_the_unit(container: dict[str, Any]) -> None:
    rights = container["securityContext"]
    line = re.search(r"^CapabilityBoundingSet=(.+)$", UNIT, re.MULTILINE)
    assert line is not None
    of_unit = {name.removeprefix("CAP_") for name in line[1].split()}
    assert rights["capabilities"] == {"drop": ["ALL"], "add": sorted(of_unit)}
    assert not rights["privileged"] and rights["readOnlyRootFilesystem"]
    assert rights["seccompProfile"] == {"type": "RuntimeDefault"}


def test_it_has_no_token_of_the_cluster() -> None:
    assert POD["automountServiceAccountToken"] is False
    assert manifests()["ServiceAccount"]["automountServiceAccountToken"] is False
    assert POD["serviceAccountName"] == manifests()["ServiceAccount"]["metadata"]["name"]


def test_what_it_writes_to_is_mounted() -> None:
    config = load_config(BASE / "agentcgroupd.toml")
    assert config.audit.path is not None and config.history.path is not None
    written = [config.server.run_dir, config.audit.path.parent, config.history.path.parent]
    volumes = {volume["name"] for volume in POD["volumes"]}
    for container in CONTAINERS:
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert {*mounts.values()} == volumes
        assert {str(path) for path in written} <= {*mounts}


def test_it_may_hold_more_than_it_lets_itself_hold() -> None:
    """Else the kernel would end it before it can disconnect whoever has most open."""
    own = load_config(BASE / "agentcgroupd.toml").limits.memory
    for container in CONTAINERS:
        resources = container["resources"]
        assert resources["requests"] == resources["limits"], "guaranteed, evicted last"
        limit = resources["limits"]["memory"].removesuffix("i")
        assert parse_bytes("limit", limit) >= own + (64 << 20)


def test_the_probes_ask_where_the_daemon_answers() -> None:
    address = load_config(BASE / "agentcgroupd.toml").server.metrics_address
    (daemon,) = POD["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = daemon[probe]["httpGet"]
        assert f"{get['host']}:{get['port']}" == address
    assert daemon["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_the_runtime_is_asked_through_the_nodes_first_process() -> None:
    """A socket that is mounted is dead once the runtime was restarted."""
    assert POD["hostPID"] is True and "SYS_PTRACE" in _capabilities()
    for path in load_config(BASE / "agentcgroupd.toml").containers.cri:
        assert path.parts[:4] == ("/", "proc", "1", "root")


def _capabilities() -> list[str]:
    (daemon,) = POD["containers"]
    found: list[str] = daemon["securityContext"]["capabilities"]["add"]
    return found
