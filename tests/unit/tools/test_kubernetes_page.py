"""The examples of docs/kubernetes.md: they are right by the schema, and say what the daemon and the
manifests say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from agentcgroupd.config_containers import ContainersConfig
from agentcgroupd.headroom.node import RESOURCE
from agentcgroupd.runtime.labels import PREFIX
from agentcgroupd.runtime.nri import SOCKETS_AT
from tests.unit.tools.test_kubernetes_monitoring import DEPLOY, ROOT, VERSIONS, kustomize

PAGE = (ROOT / "docs/kubernetes.md").read_text()
EXAMPLES = [
    yaml.safe_load(text)
    for text in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
]


def example(first: str) -> dict[str, Any]:
    """The example that begins with a key."""
    (found,) = (one for one in EXAMPLES if next(iter(one)) == first)
    result: dict[str, Any] = found
    return result


@pytest.mark.parametrize("version", VERSIONS)
def test_an_agents_pod_is_right_by_the_schema(version: str) -> None:
    mounts, main = example("volumes"), {"image": "agents/coder:1"}
    (container,) = mounts["containers"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "coder", **example("metadata")["metadata"]},
        "spec": {
            "volumes": mounts["volumes"],
            "containers": [{**container, **main, "resources": example("resources")["resources"]}],
        },
    }
    kubernetes_validate.validate(pod, version, strict=True)


def test_the_annotation_is_one_that_pods_may_have() -> None:
    (name,) = example("metadata")["metadata"]["annotations"]
    assert name.removeprefix(PREFIX) in ContainersConfig().annotations


def test_the_sockets_are_mounted_where_agents_look_for_them() -> None:
    mounts = example("volumes")
    (volume,), (container,) = mounts["volumes"], mounts["containers"]
    (mount,) = container["volumeMounts"]
    assert volume["hostPath"]["path"] == mount["mountPath"] == SOCKETS_AT
    assert volume["name"] == mount["name"] and mount["readOnly"]


def test_one_agent_is_asked_for_by_the_name_that_nodes_tell() -> None:
    resources = example("resources")["resources"]
    # Kubernetes takes an extended resource only where request and limit are the same.
    assert resources["requests"][RESOURCE] == resources["limits"][RESOURCE] == 1


def test_the_component_goes_with_an_overlay(tmp_path: Path) -> None:
    kustomization = example("apiVersion")
    used = [*kustomization["resources"], *kustomization["components"]]
    for path in used:
        assert (DEPLOY.parents[1] / path.removeprefix("agentcgroup/")).is_dir(), path
    argv = kustomize()
    if argv is None:
        return
    (tmp_path / "agentcgroup").symlink_to(ROOT)
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    done = subprocess.run([*argv, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (pod,) = (one for one in yaml.safe_load_all(done.stdout) if one["kind"] == "DaemonSet")
    names = {one["name"] for one in pod["spec"]["template"]["spec"]["containers"]}
    assert {"agentcgroupd", "headroom", "metrics"} <= names


@pytest.mark.parametrize("path", re.findall(r"(?<![\w/])deploy/[a-z/]+", PAGE))
def test_what_is_named_is_there(path: str) -> None:
    assert (ROOT / path).exists()
