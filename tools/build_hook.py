"""Build step run by hatchling: gRPC code from proto/, the static C programs, and bpf/.

Wheels and editable installs get the same files, so that a checkout behaves as an installed wheel
does. A source archive (sdist) gets none of them: whoever builds from it makes them there. Nothing
that is made here is committed.
"""

from __future__ import annotations

import ctypes
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from importlib.resources import files
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # hatchling loads this file alone
from tools.bpf_toolchain import MULTIARCH, Libbpf, ToolchainError, ensure_libbpf, find_clang

PROTO = Path("proto/agentcgroup/v1/agentcgroup.proto")
PROTOS = (PROTO, *(PROTO.with_name(f"{name}.proto") for name in ("nri", "cri")))
CFLAGS = ["-std=c11", "-O2", "-g0", "-static", "-Wall", "-Wextra", "-Werror", "-Wl,--build-id=none"]
PROGRAMS = {
    "agentcg-exec": Path("agent_sdk/exec/agentcg-exec.c"),
    "agentcg": Path("agent_sdk/exec/agentcg.c"),
    "agentcg-hook": Path("agent_sdk/exec/agentcg-hook.c"),
    "agentcg-sh": Path("agent_sdk/exec/agentcg-sh.c"),
    "agentcg-load": Path("daemon/load/agentcg-load.c"),
    "agentcg-release": Path("daemon/release/agentcg-release.c"),
    "agentcg-runtime": Path("daemon/oci/agentcg-runtime.c"),
}
BPF_OUT = Path("daemon/agentcgroupd/bpf")
# The next instruction set, v4, needs Linux 6.6.
BPF_FLAGS = "-target bpf -mcpu=v3 -O2 -g -Wall -Wextra -Wno-unused-parameter -Werror".split()
# The machine's name in libbpf's headers, which read a traced function's arguments from registers.
BPF_MACHINES = {"x86_64": "x86", "aarch64": "arm64"}


def generate_grpc(root: Path) -> None:
    """Write agentcgroup_pb2{,_grpc}.py and their stubs below agent_sdk/agentcgroup/v1."""
    out = root / "agent_sdk"
    well_known = str(files("grpc_tools") / "_proto")
    plugin_dir = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{plugin_dir}{os.pathsep}{os.environ.get('PATH', '')}"}
    includes = [f"-I{root / 'proto'}", f"-I{well_known}"]
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    protoc = [sys.executable, "-m", "grpc_tools.protoc"]
    subprocess.run(
        [*protoc, *includes, *outputs, *(str(root / path) for path in PROTOS)], check=True, env=env
    )
    (out / "agentcgroup/v1/__init__.py").write_text('"""Generated from proto/."""\n')


def intent_fields_header(proto: str) -> str:
    """Make the C header with the launcher's options from the text of the proto: INTENT_FIELDS(X)
    is X(field, option) for each field of the message Intent, INTENT_HELP their lines of help, which
    are the comments of the fields."""
    message = re.search(r"^message Intent \{$(.*?)^\}$", proto, re.MULTILINE | re.DOTALL)
    assert message is not None, "the proto has no message Intent"
    meanings: dict[str, str] = {}
    for line in message[1].splitlines():
        found = re.match(r" *string (\w+) = \d+; *// *(.*)", line)
        more = re.match(r" {8,}// *(.*)", line)
        if found:
            meanings[found[1]] = found[2]
        elif more and meanings:
            meanings[[*meanings][-1]] += f" {more[1]}"
    options = {field: field.replace("_", "-") for field in meanings}
    entries = " \\\n".join(f'\tX({field}, "{option}")' for field, option in options.items())
    lines: list[str] = []
    for field, option in options.items():
        meaning = meanings[field].replace("%", "%%")
        # The text of a C string: what quotes and backslashes are in it is escaped.
        lines += textwrap.wrap(
            f"  --{option} X  {meaning}", 90, subsequent_indent=" " * 6, break_on_hyphens=False
        )
    help_text = " \\\n".join(f'\t{json.dumps(line)[:-1]}\\n"' for line in lines)
    return (
        "/* Made from proto/ by tools/build_hook.py. */\n"
        f"#define INTENT_FIELDS(X) \\\n{entries}\n"
        f"#define INTENT_HELP \\\n{help_text}\n"
    )


def c_compiler() -> list[str]:
    """Choose what compiles the C programs: $CC, else musl's wrapper of gcc where it is installed,
    else cc.

    A static program with glibc asks the CPU for all its features and caches before it starts, which
    a virtual machine answers slowly: 0.6 ms, of which musl's takes nothing. musl has no headers of
    the kernel, so they are taken from where glibc's are, behind its own.
    """
    if named := os.environ.get("CC"):
        return [named]
    if (musl := shutil.which("musl-gcc")) is None:
        return ["cc"]
    kernel = [f"/usr/include/{MULTIARCH}", "/usr/include"]
    return [musl, *(word for path in kernel for word in ("-idirafter", path))]


def compile_programs(root: Path, version: str) -> None:
    """Compile each C program to build/bin, statically, so that it starts in a fraction of a ms.

    `version` is what `agentcg-exec --version` says. A program that is newer than its source, than
    the options made from the proto, than the choice of a compiler and than pyproject.toml, where
    the version stands, is left as it is.
    """
    bin_dir, include = root / "build/bin", root / "build/include"
    for directory in (bin_dir, include):
        directory.mkdir(parents=True, exist_ok=True)
    header, chosen = include / "intent_fields.h", include / "compiler"
    compiler = [*c_compiler(), *CFLAGS]
    made = {
        header: intent_fields_header((root / PROTO).read_text(encoding="utf-8")),
        chosen: "\n".join([*compiler, ""]),
    }
    compiler += [f'-DAGENTCG_VERSION="{version}"', f"-I{include}"]
    for file, text in made.items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
    for name, source in PROGRAMS.items():
        target, path = bin_dir / name, root / source
        others = (*made, root / "pyproject.toml", *path.parent.glob("*.h"))
        newest = max(file.stat().st_mtime for file in (path, *others))
        if target.exists() and target.stat().st_mtime > newest:
            continue
        subprocess.run([*compiler, "-o", str(target), str(path)], check=True)


def make_shell_files(root: Path, version: str) -> None:
    """Write completion and manual pages below build/share, from the parsers in this checkout.

    What pip has put into PYTHONPATH stays: where it builds in isolation, shtab is found by that.
    """
    packages = [str(root / name) for name in (".", "agent_sdk", "daemon", "lab")]
    paths = [*packages, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    share = root / "build/share"
    shutil.rmtree(share, ignore_errors=True)
    command = [sys.executable, "-m", "tools.shell_files", str(share), version]
    subprocess.run(command, check=True, env=env, cwd=root)


def build_bpf(root: Path) -> None:
    """Compile bpf/*.bpf.c, and put libbpf with its licence beside. Raises ToolchainError."""
    libbpf = ensure_libbpf(root / "build/libbpf")
    compile_bpf(root, libbpf)
    out = root / BPF_OUT / "lib"
    out.mkdir(exist_ok=True)
    for source, name in ((libbpf.library, "libbpf.so.1"), (libbpf.licence, "LICENSE.libbpf")):
        target = out / name
        if target.exists() and filecmp.cmp(source, target, shallow=False):
            continue
        # Renamed into place: a daemon may have the old file mapped, and must keep it.
        new = target.with_name(f".{name}.{os.getpid()}")
        shutil.copyfile(source, new)
        new.replace(target)


def compile_bpf(root: Path, libbpf: Libbpf) -> None:
    """Compile each program that is older than its source or any header. Raises ToolchainError."""
    out = root / BPF_OUT / "objects"
    out.mkdir(parents=True, exist_ok=True)
    sources = {path.with_suffix(".o").name: path for path in (root / "bpf").glob("*.bpf.c")}
    for path in out.glob("*.bpf.o"):
        if path.name not in sources:
            path.unlink()
    newest_header = max(path.stat().st_mtime for path in (root / "bpf").glob("*.h"))
    clang = ""
    for name, source in sorted(sources.items()):
        target = out / name
        newest = max(source.stat().st_mtime, newest_header)
        if target.exists() and target.stat().st_mtime > newest:
            continue
        clang = clang or find_clang()
        with tempfile.TemporaryDirectory(dir=out, prefix=".") as work:
            whole, linked = Path(work) / "whole.o", Path(work) / "linked.o"
            compile_object(root, clang, libbpf, source, whole)
            drop_dwarf(libbpf, whole, linked)
            linked.replace(target)


def compile_object(
    root: Path, clang: str, libbpf: Libbpf, source: Path, target: Path, machine: str = ""
) -> None:
    """Compile one BPF program. Raises ToolchainError, after clang's own messages.

    `machine`: whose kernel runs it, else this one's. The kernel's headers for programs do not
    differ between those that are known here, so those of this machine will do.
    """
    machine = machine or os.uname().machine
    if machine not in BPF_MACHINES:
        raise ToolchainError(f"bpf/ is for {' and '.join(BPF_MACHINES)}; this is {machine}")
    flags = [*BPF_FLAGS, f"-D__TARGET_ARCH_{BPF_MACHINES[machine]}"]
    # Clang knows no include directory for this target.
    flags += ["-isystem", f"/usr/include/{MULTIARCH}", "-isystem", str(libbpf.include)]
    flags += [f"-ffile-prefix-map={root}=."]
    argv = [clang, *flags, "-c", str(source), "-o", str(target)]
    done = subprocess.run(argv, stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        what = f"{clang} could not compile {source.relative_to(root)}"
        header = re.search(r"'((?:linux|asm|asm-generic)/\S+)' file not found", done.stderr)
        if header:
            what += f": {header[1]} is missing (Debian: linux-libc-dev)"
        raise ToolchainError(what)


def drop_dwarf(libbpf: Libbpf, source: Path, target: Path) -> None:
    """Pass an object through libbpf's linker, as `bpftool gen object` does. Raises ToolchainError.

    The linker keeps the programs and their BTF and leaves the debugging information, two thirds of
    the file, behind.
    """
    try:
        library = ctypes.CDLL(str(libbpf.library), use_errno=True)
    except OSError as error:
        raise ToolchainError(f"{error} (Debian: libelf1, zlib1g)") from error
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    library.bpf_linker__new.restype = pointer
    library.bpf_linker__new.argtypes = (text, pointer)
    library.bpf_linker__add_file.argtypes = (pointer, text, pointer)
    library.bpf_linker__finalize.argtypes = (pointer,)
    library.bpf_linker__free.argtypes = (pointer,)
    linker = library.bpf_linker__new(bytes(target), None)
    if not linker:
        raise ToolchainError(f"libbpf's linker: {os.strerror(ctypes.get_errno())}")
    result = library.bpf_linker__add_file(linker, bytes(source), None)
    result = result or library.bpf_linker__finalize(linker)
    library.bpf_linker__free(linker)
    if result < 0:
        raise ToolchainError(f"libbpf's linker: {os.strerror(-result)}")


class BuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling's entry point."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make what a wheel holds besides the sources, and say that it is for one machine.

        `version` is hatchling's word for the kind of build: "standard" or "editable".
        """
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        generate_grpc(root)
        compile_programs(root, self.metadata.version)
        make_shell_files(root, self.metadata.version)
        try:
            build_bpf(root)
        except ToolchainError as error:
            self.app.abort(f"agentcgroup: {error}")
        build_data["pure_python"] = False
        if version == "standard":  # an editable install reads them from the checkout
            included = build_data["force_include"]
            included[str(root / "policies")] = "agentcgroupd/policies"
            included[str(root / "docs/configuration.md")] = "agentcgroupd/configuration.md"
        build_data["tag"] = f"py3-none-linux_{os.uname().machine}"
