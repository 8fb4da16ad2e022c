"""The component that gives the daemon's metrics to a Prometheus; and all that kustomize makes."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from agentcgroupd.config import load_config

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy/kubernetes"
BASE, COMPONENT = DEPLOY / "base", DEPLOY / "components/monitoring"
VERSIONS = ["1.30", kubernetes_validate.latest_version()]
PATCH = yaml.safe_load((COMPONENT / "daemonset.yaml").read_text())
RBAC = list(yaml.safe_load_all((COMPONENT / "rbac.yaml").read_text()))
MONITOR = yaml.safe_load((COMPONENT / "podmonitor.yaml").read_text())
(PROXY,) = PATCH["spec"]["template"]["spec"]["containers"]
KUSTOMIZATIONS = sorted(
    path.parent.relative_to(DEPLOY)
    for path in DEPLOY.rglob("kustomization.yaml")
    if "components" not in path.parts
)


def patched() -> dict[str, Any]:
    """The base's DaemonSet with the component's, merged as kustomize does: lists by name."""
    whole = copy.deepcopy(yaml.safe_load((BASE / "daemonset.yaml").read_text()))
    pod, more = whole["spec"]["template"]["spec"], PATCH["spec"]["template"]["spec"]
    for key in ("containers", "volumes"):
        names = {one["name"] for one in pod[key]}
        assert not names & {one["name"] for one in more[key]}, "the base's own stay as they are"
        pod[key] += more[key]
    result: dict[str, Any] = whole
    return result


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = (one for one in RBAC if (one["kind"], one["metadata"]["name"]) == (kind, name))
    result: dict[str, Any] = found
    return result


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", [patched(), *RBAC], ids=lambda one: str(one["kind"]))
def test_the_schema_holds(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_its_files_are_used() -> None:
    kustomization = yaml.safe_load((COMPONENT / "kustomization.yaml").read_text())
    used = {*kustomization["resources"], "kustomization.yaml"}
    used |= {patch["path"] for patch in kustomization["patches"]}
    assert {path.name for path in COMPONENT.iterdir()} == used
    assert [image["name"] for image in kustomization["images"]] == [PROXY["image"]]


def test_the_monitor_finds_the_port_of_the_pod() -> None:
    labels = patched()["spec"]["template"]["metadata"]["labels"]
    assert MONITOR["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = MONITOR["spec"]["podMetricsEndpoints"]
    (port,) = PROXY["ports"]
    assert endpoint["port"] == port["name"]
    assert f"--secure-listen-address=[$(POD_IP)]:{port['containerPort']}" in PROXY["args"]


def test_the_proxy_asks_the_daemon_where_it_answers_and_for_nothing_but_metrics() -> None:
    address = load_config(BASE / "agentcgroupd.toml").server.metrics_address
    assert f"--upstream=http://{address}/" in PROXY["args"]
    assert "--allow-paths=/metrics" in PROXY["args"]


def test_prometheus_has_a_token_that_may_read_metrics_and_nothing_else() -> None:
    (endpoint,) = MONITOR["spec"]["podMetricsEndpoints"]
    secret = named("Secret", endpoint["authorization"]["credentials"]["name"])
    account = secret["metadata"]["annotations"]["kubernetes.io/service-account.name"]
    assert named("ServiceAccount", account)["automountServiceAccountToken"] is False
    bindings = [one for one in RBAC if one["kind"] == "ClusterRoleBinding"]
    (binding,) = (one for one in bindings if one["subjects"][0]["name"] == account)
    role = named("ClusterRole", binding["roleRef"]["name"])
    assert role["rules"] == [{"nonResourceURLs": ["/metrics"], "verbs": ["get"]}]


def test_the_pod_stays_guaranteed_and_the_proxy_has_no_rights_on_the_node() -> None:
    pod = patched()["spec"]["template"]["spec"]
    for container in pod["containers"]:
        assert container["resources"]["requests"] == container["resources"]["limits"]
    rights = PROXY["securityContext"]
    assert rights["capabilities"] == {"drop": ["ALL"]} and rights["runAsNonRoot"]
    assert [mount["name"] for mount in PROXY["volumeMounts"]] == ["proxy-token"]
    (daemon,) = (one for one in pod["containers"] if one["name"] == "agentcgroupd")
    assert "proxy-token" not in {mount["name"] for mount in daemon["volumeMounts"]}


def kustomize() -> list[str] | None:
    """A command that renders a kustomization: kustomize, or the kubectl that has it inside."""
    for argv in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(argv[0]):
            return argv
    return None


@pytest.mark.parametrize("of", KUSTOMIZATIONS, ids=str)
def test_what_kustomize_makes_is_right(of: Path) -> None:
    """With kustomize or kubectl where one is here; the other tests merge by themselves."""
    argv = kustomize()
    if argv is None:
        assert (DEPLOY / of / "kustomization.yaml").is_file()
        return
    done = subprocess.run([*argv, str(DEPLOY / of)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    assert "DaemonSet" in {one["kind"] for one in made}
    for one in made:
        assert one["kind"] == "Namespace" or "Cluster" in one["kind"] or _namespace(one)
        if one["apiVersion"] != "monitoring.coreos.com/v1":
            for version in VERSIONS:
                kubernetes_validate.validate(one, version, strict=True)


def _namespace(manifest: dict[str, Any]) -> bool:
    return bool(manifest["metadata"]["namespace"] == "agentcgroup")
