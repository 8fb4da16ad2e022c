"""Load an object of programs that is one feature of the daemon's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from agentcgroupd.bpf import features
from agentcgroupd.bpf.btf import VMLINUX, Btf, kernel_btf
from agentcgroupd.bpf.features import FeatureState
from agentcgroupd.bpf.loader import BpfObject
from agentcgroupd.errors import BpfError

Programs = TypeVar("Programs")


def load_one(
    name: str,
    made_of: Callable[[BpfObject], Programs],
    objects: Path | None = None,
    btf: Btf | None = None,
) -> tuple[Programs | None, list[FeatureState]]:
    """Load an object by its name if this kernel can have it, and make its programs of it.

    objects: the directory of the compiled objects; None: those that came with the daemon. btf: the
    kernel's types, where they are not those of its own image. Returns None for programs that this
    kernel cannot have, and the feature's state with the reason. Raises no BpfError.
    """
    (definition,) = features.definitions_of(name)
    try:
        types = btf or kernel_btf()
    except BpfError as error:
        remedy = "" if VMLINUX.exists() else features.BTF_REMEDY
        return None, [features.missing(definition, features.one_line(error), remedy)]
    try:
        state = features.gate(definition, types)
        if not state.works:
            return None, [state]
        bpf = BpfObject.open(name, objects / f"{name}.bpf.o" if objects else None)
        try:
            bpf.load()
            return made_of(bpf), [state]
        except BaseException:
            bpf.close()
            raise
    except BpfError as error:
        remedy = features.remedy_of(error)
        return None, [features.missing(definition, features.one_line(error), remedy)]
