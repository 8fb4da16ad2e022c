"""scx_flatcg, the scheduler to be compared with: from Debian's kernel source, built for the run
into build/flatcg, and loaded.

Needs the network once (the source package is 160 MB), clang, and bpftool from Debian; nothing is
installed. The kernel's types come from the test kernel's own image.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from agentcgroupd.bpf.btf import Btf
from agentcgroupd.bpf.libbpf import libbpf
from bench.report import ROOT
from bpf_toolchain import MULTIARCH, ensure_libbpf, find_clang
from debian_suites import Apt, find_mirror, unpack

BUILD = ROOT / "build/flatcg"
OBJECT = BUILD / "scx_flatcg.bpf.o"
ENUMS = BUILD / "enums.json"
SUITE = "trixie-backports"
CGROUP_SLICE_NS = 20_000_000
"""Its own default: scx_flatcg.c."""


def build(vmlinux: Path, release: str) -> Path:
    """The compiled object for a kernel image; made once. `release`: as `uname -r` says it.
    Raises SuiteError, ToolchainError, CalledProcessError."""
    if OBJECT.exists():
        return OBJECT
    BUILD.mkdir(parents=True, exist_ok=True)
    version = ".".join(release.split(".")[:2])
    with tempfile.TemporaryDirectory(dir=BUILD) as work:
        source, bpftool = _fetch(Path(work), version)
        header = subprocess.run([bpftool, "btf", "dump", "file", vmlinux, "format", "c"],
                                stdout=subprocess.PIPE, text=True, check=True).stdout  # fmt: skip
        (Path(work) / "vmlinux.h").write_text(header)
        found = re.findall(r"^\t(SCX_\w+) = (-?\d+)(?:ULL)?,$", header, re.MULTILINE)
        ENUMS.write_text(json.dumps({name: int(value) for name, value in found}))
        tools = source / "tools"
        subprocess.run([
            find_clang(), "-target", "bpf", "-mcpu=v3", "-O2", "-g", "-D__TARGET_ARCH_x86",
            "-DBPF_NO_PRESERVE_ACCESS_INDEX", f"-I{work}", f"-I{tools}/sched_ext/include",
            f"-I{tools}/sched_ext/include/bpf-compat", f"-I{tools}/include/uapi",
            "-isystem", str(ensure_libbpf().include), "-isystem", f"/usr/include/{MULTIARCH}",
            "-Wno-compare-distinct-pointer-types", "-Wno-microsoft-anon-tag", "-fms-extensions",
            "-c", str(tools / "sched_ext/scx_flatcg.bpf.c"), "-o", str(OBJECT),
        ], check=True)  # fmt: skip
    return OBJECT


def _fetch(work: Path, version: str) -> tuple[Path, Path]:
    """(kernel source, bpftool) below `work`."""
    apt = Apt(BUILD / "apt", SUITE, find_mirror())
    apt.update()
    (work / "deb").mkdir()
    unpack(apt.download([f"linux-source-{version}"], work / "deb"), work / "source")
    archive = work / f"source/usr/src/linux-source-{version}.tar.xz"
    subprocess.run(
        ["tar", "-xJf", archive, "-C", work, f"linux-source-{version}/tools"], check=True
    )
    # One that runs with this machine's libraries.
    (work / "bpftool").mkdir()
    subprocess.run(["apt-get", "-q", "download", "bpftool"], cwd=work / "bpftool", check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    unpack((work / "bpftool").glob("*.deb"), work / "bpftool/files")
    return work / f"linux-source-{version}", work / "bpftool/files/usr/sbin/bpftool"


class Flatcg:
    """The scheduler, attached for the length of a `with`."""

    def __init__(self) -> None:
        """Raises BpfError."""
        self._link = 0
        self._object = libbpf().pointer(
            "scx_flatcg", "bpf_object__open_file", str(OBJECT).encode(), None
        )

    def __enter__(self) -> Self:
        self._set_constants()
        libbpf().check("loading scx_flatcg", "bpf_object__load", self._object)
        ops = self._map("flatcg_ops")
        self._link = libbpf().pointer("attaching scx_flatcg", "bpf_map__attach_struct_ops", ops)
        return self

    def __exit__(self, *_: object) -> None:
        if self._link:
            libbpf().call("bpf_link__destroy", self._link)
        libbpf().call("bpf_object__close", self._object)

    def _map(self, name: str) -> int:
        return libbpf().pointer(
            f"scx_flatcg: {name}", "bpf_object__find_map_by_name", self._object, name.encode()
        )

    def _set_constants(self) -> None:
        """What scx_flatcg.c and its headers set: the CPUs, the slice, the kernel's numbers."""
        numbers = json.loads(ENUMS.read_text())
        types = Btf(libbpf().pointer("types", "bpf_object__btf", self._object))
        size = ctypes.c_size_t()
        start = libbpf().pointer("constants", "bpf_map__initial_value", self._map(".rodata"),
                                 ctypes.byref(size))  # fmt: skip
        wanted = {f"__{name}": value for name, value in numbers.items()}
        wanted |= {"nr_cpus": os.cpu_count() or 1, "cgrp_slice_ns": CGROUP_SLICE_NS}
        for name, (offset, length) in types.variables(".rodata").items():
            if name in wanted:
                kind = ctypes.c_uint64 if length == 8 else ctypes.c_uint32
                kind.from_address(start + offset).value = wanted[name]
