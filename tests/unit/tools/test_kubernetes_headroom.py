"""The overlay that tells the cluster how many agents a node has room for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from agentcgroupd.headroom import __main__ as headroom
from agentcgroupd.headroom.node import ACCOUNT

ROOT = Path(__file__).parents[3]
OVERLAY = ROOT / "deploy/kubernetes/overlays/headroom"
BASE = ROOT / "deploy/kubernetes/base"
VERSIONS = ["1.30", kubernetes_validate.latest_version()]
PATCH = yaml.safe_load((OVERLAY / "daemonset.yaml").read_text())
RBAC = list(yaml.safe_load_all((OVERLAY / "rbac.yaml").read_text()))
(SIDECAR,) = PATCH["spec"]["template"]["spec"]["containers"]


def patched() -> dict[str, Any]:
    """The base's DaemonSet with the overlay's, merged as kustomize does: lists by name."""
    whole = copy.deepcopy(yaml.safe_load((BASE / "daemonset.yaml").read_text()))
    pod, more = whole["spec"]["template"]["spec"], PATCH["spec"]["template"]["spec"]
    for key in ("containers", "volumes"):
        names = {one["name"] for one in pod[key]}
        assert not names & {one["name"] for one in more[key]}, "the base's own stay as they are"
        pod[key] += more[key]
    result: dict[str, Any] = whole
    return result


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", [patched(), *RBAC], ids=lambda one: str(one["kind"]))
def test_the_schema_holds(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_its_files_are_used() -> None:
    kustomization = yaml.safe_load((OVERLAY / "kustomization.yaml").read_text())
    used = {name for name in kustomization["resources"] if name.endswith(".yaml")}
    used |= {patch["path"] for patch in kustomization["patches"]} | {"kustomization.yaml"}
    assert {path.name for path in OVERLAY.iterdir()} == used
    assert (OVERLAY / "../../base").resolve() == BASE


def test_it_may_patch_the_status_of_nodes_and_nothing_else() -> None:
    role, binding = RBAC
    assert role["rules"] == [{"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    account = yaml.safe_load((BASE / "serviceaccount.yaml").read_text())
    assert binding["subjects"][0]["name"] == account["metadata"]["name"]


def test_only_the_sidecar_has_a_token_and_no_rights_on_the_node() -> None:
    pod = patched()["spec"]["template"]["spec"]
    with_token = [
        one["name"]
        for one in (*pod["initContainers"], *pod["containers"])
        if str(ACCOUNT) in {mount["mountPath"] for mount in one["volumeMounts"]}
    ]
    assert with_token == ["headroom"] and pod["automountServiceAccountToken"] is False
    rights = SIDECAR["securityContext"]
    assert rights["capabilities"] == {"drop": ["ALL"]} and rights["runAsNonRoot"]
    assert SIDECAR["command"][-1] == headroom.__name__.removesuffix(".__main__")
    assert SIDECAR["resources"]["requests"] == SIDECAR["resources"]["limits"]
