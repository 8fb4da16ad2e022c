"""Configuration of containers that become sessions by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from agentcgroupd.config_values import Flag, OptionalPath, Section
from agentcgroupd.errors import InvalidField
from agentcgroupd.units import parse_labels

LABEL_FIELDS = {
    "session": "",
    "exec-is-call": "exec_is_call",
    "memory": "memory_low",
    "memory-high": "memory_high",
    "memory-max": "memory_max",
    "cpu-weight": "cpu_weight",
    "cpu-max": "cpu_max",
    "io-weight": "io_weight",
    "io-latency": "io_latency",
    "pids-max": "pids_max",
    "priority": "priority",
    "calls-max": "calls_max",
    "gpu": "gpu",
    "gpu-memory": "gpu_memory",
    "gpu-priority": "gpu_priority",
    "gpu-device": "gpu_device",
}
"""Labels of containers without `agentcgroup.`, and the field of a session's spec that each sets;
empty: it is read otherwise."""
LABEL_OF_SESSION = "label."
"""Before the key of a label of the session itself."""


def is_known(name: str) -> bool:
    """Tell whether a label without `agentcgroup.` means something. Raises InvalidField for a key
    that no label of a session may have."""
    if not name.startswith(LABEL_OF_SESSION):
        return name in LABEL_FIELDS
    parse_labels("labels", {name.removeprefix(LABEL_OF_SESSION): "any"})
    return True


_KNOWN = ", ".join((*LABEL_FIELDS, f"{LABEL_OF_SESSION}KEY"))


def _labels(labels: dict[str, str]) -> dict[str, str]:
    for name, value in labels.items():
        if not is_known(name):
            raise InvalidField("labels", name, _KNOWN)
        if not isinstance(value, str):
            raise InvalidField("labels", repr(value), "text, in quotes")
    return labels


def _label_name(name: str) -> str:
    if not is_known(name):
        raise InvalidField("annotations", name, _KNOWN)
    return name


LabelName = Annotated[str, AfterValidator(_label_name)]


class ContainerRule(Section):
    """Containers that are sessions without a label of their own."""

    image: str = "*"
    """Glob on the image, as it was named when the container was made."""
    name: str = "*"
    """Glob on the container's name."""
    labels: Annotated[Mapping[str, str], BeforeValidator(_labels)] = Field(default_factory=dict)
    """Labels that it is taken to have, without `agentcgroup.`; its own win."""


class ContainersConfig(Section):
    """Containers that become sessions by themselves (runtime/)."""

    enabled: Flag = True
    docker: OptionalPath = Path("/run/docker.sock")
    """Docker's socket, which need not be there; empty: Docker is not asked."""
    podman: OptionalPath = Path("/run/podman/podman.sock")
    nri: OptionalPath = Path("/run/nri/nri.sock")
    """Socket of the Node Resource Interface of containerd or CRI-O."""
    cri: tuple[Path, ...] = (
        Path("/run/containerd/containerd.sock"),
        Path("/run/crio/crio.sock"),
    )
    """Sockets of the Container Runtime Interface; none need be there."""
    annotations: tuple[LabelName, ...] = (
        *("session", "exec-is-call", "memory-high", "memory-max", "cpu-max"),
        *("pids-max", "calls-max"),
    )
    """What annotations of pods and labels of images may set, which are not the operator's own."""
    rules: tuple[ContainerRule, ...] = ()
    """The first that fits gives a container its labels."""
