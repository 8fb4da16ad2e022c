"""What the archives hold, that they install, and what the build says when something is missing."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomllib

import agentcgroup
from tools import bpf_toolchain, build_hook, check_wheel
from tools.bpf_toolchain import Libbpf, ToolchainError

ROOT = Path(__file__).resolve().parents[3]
# One Python is enough for every change; all that are in PATH are tried before a release.
ALL_PYTHONS = os.environ.get("AGENTCG_ALL_PYTHONS") == "1"


@dataclass
class Built:
    """A copy of the checkout, and the archives that were made of it there."""

    tree: Path
    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    work = tmp_path_factory.mktemp("build")
    tree = check_wheel.copy_checkout(work / "tree", compiled=True)
    wheel, sdist = check_wheel.build(tree, "wheel"), check_wheel.build(tree, "sdist")
    unpacked = check_wheel.unpack_sdist(sdist, work / "sdist")
    for made in ("build", "daemon/agentcgroupd/bpf/objects"):
        shutil.copytree(tree / made, unpacked / made)
    return Built(tree, wheel, sdist, check_wheel.build(unpacked, "wheel"))


def test_a_wheel_holds_programs_and_libbpf(built: Built, tmp_path: Path) -> None:
    tree = built.tree
    with zipfile.ZipFile(built.wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    programs = {path.with_suffix(".o").name for path in (ROOT / "bpf").glob("*.bpf.c")}
    folder = "agentcgroupd/bpf/objects/"
    objects = {name.removeprefix(folder) for name in files if name.startswith(folder)}
    assert "lifecycle.bpf.o" in objects
    assert objects == programs - {"abi.bpf.o"}
    for name in objects:
        content = files[folder + name]
        assert content[:4] == b"\x7fELF"
        assert int.from_bytes(content[18:20], sys.byteorder) == 247  # EM_BPF, linux/elf-em.h
        assert b".BTF" in content
        assert b".debug_" not in content
        assert bytes(ROOT) not in content
    policies = {n for n in files if n.startswith("agentcgroupd/policies/")}
    assert {f"agentcgroupd/policies/{p.name}" for p in (ROOT / "policies").iterdir()} == policies
    assert b"Redistribution" in files["agentcgroupd/bpf/lib/LICENSE.libbpf"]
    library = tmp_path / "libbpf.so.1"
    library.write_bytes(files["agentcgroupd/bpf/lib/libbpf.so.1"])
    loaded = ctypes.CDLL(str(library))
    version = (loaded.libbpf_major_version(), loaded.libbpf_minor_version())
    assert version >= bpf_toolchain.LIBBPF_LEAST
    assert (tree / "daemon/agentcgroupd/bpf/objects/abi.bpf.o").exists()


def test_a_source_archive_holds_sources_and_makes_the_same_wheel(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        (top,) = {name.partition("/")[0] for name in archive.getnames()}
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    policies = {f"policies/{path.name}" for path in (ROOT / "policies").iterdir()}
    assert policies <= names
    assert {"bpf/abi.h", "proto/agentcgroup/v1/agentcgroup.proto", "tools/build_hook.py"} <= names
    assert not [name for name in names if name.endswith((".o", ".so.1", "_pb2.py"))]
    with zipfile.ZipFile(built.wheel) as one, zipfile.ZipFile(built.wheel_of_sdist) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_the_version_stands_in_pyproject_toml(built: Built) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert agentcgroup.__version__ == project["version"]
    assert built.wheel.name.split("-")[1] == project["version"]
    with zipfile.ZipFile(built.wheel) as archive:
        (launcher,) = (n for n in archive.namelist() if n.endswith("/scripts/agentcg-exec"))
        assert f"agentcg-exec {project['version']}\n\0".encode() in archive.read(launcher)


@pytest.mark.timeout(3600 if ALL_PYTHONS else 900)
def test_the_wheel_works_in_a_fresh_environment(built: Built, tmp_path: Path) -> None:
    this = f"python{sys.version_info.major}.{sys.version_info.minor}"
    pythons = check_wheel.find_pythons([] if ALL_PYTHONS else [this])
    assert pythons
    for python, version in pythons.items():
        check_wheel.check_install(built.wheel_of_sdist, python, version, tmp_path)


def test_a_python_that_is_not_supported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "python3.12", "echo 3 12")
    program(tmp_path / "python3.13", "echo 'no such version' >&2; exit 127")
    program(tmp_path / "python3.9", "echo 3 9")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_wheel.find_pythons() == {str(tmp_path / "python3.12"): (3, 12)}
    for name in ("python3.9", "python3.13", "python3.14"):
        with pytest.raises(check_wheel.CheckError, match=f"{name} is no Python"):
            check_wheel.find_pythons([name])


def test_a_missing_clang_is_said_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLANG", "no-such-clang")
    tree = check_wheel.copy_checkout(tmp_path / "tree")
    with pytest.raises(check_wheel.CheckError, match="ended with 1, not 0") as caught:
        check_wheel.build(tree, "wheel")
    last = str(caught.value).splitlines()[-1]
    assert last == "agentcgroup: CLANG=no-such-clang: there is no clang of this name"
    assert "Traceback" not in str(caught.value)


def test_objects_are_made_anew_only_when_a_source_or_a_header_is_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path
    (root / "bpf").mkdir()
    for name in ("abi.bpf.c", "abi.h"):
        shutil.copy(ROOT / "bpf" / name, root / "bpf")
    objects = root / build_hook.BPF_OUT / "objects"
    objects.mkdir(parents=True)
    (objects / "renamed.bpf.o").touch()
    libbpf = bpf_toolchain.ensure_libbpf()
    build_hook.compile_bpf(root, libbpf)
    assert [path.name for path in objects.iterdir()] == ["abi.bpf.o"]
    monkeypatch.setenv("CLANG", "no-such-clang")
    build_hook.compile_bpf(root, libbpf)
    made = (objects / "abi.bpf.o").stat().st_mtime
    os.utime(root / "bpf/abi.h", (made + 1, made + 1))
    with pytest.raises(ToolchainError, match="no-such-clang"):
        build_hook.compile_bpf(root, libbpf)


def program(path: Path, script: str) -> Path:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_missing_kernel_headers_are_named(tmp_path: Path) -> None:
    says = "fatal error: 'asm/types.h' file not found"
    clang = program(tmp_path / "clang", f'echo "{says}" >&2; exit 1')
    libbpf = Libbpf(tmp_path, tmp_path, tmp_path)
    with pytest.raises(ToolchainError, match=r"asm/types.h is missing .*linux-libc-dev"):
        build_hook.compile_object(
            tmp_path, str(clang), libbpf, tmp_path / "a.bpf.c", tmp_path / "a.o"
        )


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({"clang": 14, "clang-17": 17, "clang-22": 22}, "clang-22"),
        ({"clang": 17, "clang-22": 22}, "clang"),
        ({"clang": 17, "clang-19": 19, "clang-22": 22}, "clang-19"),
        ({"clang": 14, "clang-15": 15}, None),
        ({}, None),
    ],
)
def test_which_clang(versions: dict[str, int], expected: str | None, tmp_path: Path) -> None:
    for name, version in versions.items():
        program(tmp_path / name, f"echo 'Debian clang version {version}.1.7 (3~deb12u1)'")
    (tmp_path / "clang-format-19").touch()
    environ = {"PATH": str(tmp_path)}
    if expected:
        assert bpf_toolchain.find_clang(environ) == str(tmp_path / expected)
    else:
        with pytest.raises(ToolchainError, match="please install one"):
            bpf_toolchain.find_clang(environ)


def test_a_chosen_clang_is_not_replaced(tmp_path: Path) -> None:
    old = program(tmp_path / "old", "echo clang version 15.0.6")
    with pytest.raises(ToolchainError, match=r"is clang 15; bpf/ needs 16 or later"):
        bpf_toolchain.find_clang({"PATH": os.defpath, "CLANG": str(old)})
    other = program(tmp_path / "other", "echo gcc 12")
    with pytest.raises(ToolchainError, match="there is no clang of this name"):
        bpf_toolchain.find_clang({"PATH": os.defpath, "CLANG": str(other)})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["clang", "clang-14", "clang-19", "clang-22", "clang-tidy-23"], "clang-19"),
        (["clang", "clang-14", "clang-17"], "clang-17"),
        (["clang", "clang-14"], "clang"),
        ([], "clang"),
    ],
)
def test_which_clang_is_installed(names: list[str], expected: str) -> None:
    assert bpf_toolchain.clang_package(names) == expected


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [("1:1.5.0-3", True), ("1:1.1.2-0+deb12u1", False), ("2.0-1", True), ("(none)", False)],
)
def test_whether_debian_offers_libbpf(candidate: str, expected: bool) -> None:
    policy = f"libbpf-dev:\n  Installed: (none)\n  Candidate: {candidate}\n  Version table:\n"
    assert bpf_toolchain.libbpf_is_offered(policy) is expected


def lay_out(root: Path, headers: str, library: str) -> tuple[Path, list[Path], list[Path]]:
    """A libbpf of these versions; arguments for Libbpf.at."""
    major, minor = headers.split(".")
    (root / "include/bpf").mkdir(parents=True)
    (root / "include/bpf/libbpf_version.h").write_text(
        f"#define LIBBPF_MAJOR_VERSION {major}\n#define LIBBPF_MINOR_VERSION {minor}\n"
    )
    (root / f"libbpf.so.{library}.0").touch()
    (root / "libbpf.so.1").symlink_to(f"libbpf.so.{library}.0")
    (root / "copyright").touch()
    return root / "include", [root / "none", root / "libbpf.so.1"], [root / "copyright"]


def test_libbpf_with_headers_and_licence(tmp_path: Path) -> None:
    include, libraries, licences = lay_out(tmp_path, "1.10", "1.10")
    assert Libbpf.at(include, libraries, licences) == Libbpf(include, libraries[1], licences[0])


@pytest.mark.parametrize(
    ("headers", "library", "message"),
    [("1.3", "1.3", "libbpf_version.h is version 1.3"), ("1.4", "1.1", "so.1 is version 1.1")],
)
def test_old_libbpf_does_not_count(
    headers: str, library: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ToolchainError, match=message):
        Libbpf.at(*lay_out(tmp_path, headers, library))


def test_incomplete_libbpf_does_not_count(tmp_path: Path) -> None:
    include, libraries, _ = lay_out(tmp_path, "1.4", "1.4")
    with pytest.raises(ToolchainError, match="No such file"):
        Libbpf.at(tmp_path, [], [])
    with pytest.raises(ToolchainError, match=r"libbpf.so.1 is not with"):
        Libbpf.at(include, [], [])
    with pytest.raises(ToolchainError, match="without its licence"):
        Libbpf.at(include, libraries, [])


def test_fetching_is_not_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpf_toolchain, "_system_places", lambda: iter(()))
    fetched = []

    def fetch(into: Path, log: object) -> None:
        fetched.append(into)
        for directory in (into / "include/bpf", into / "lib"):
            directory.mkdir(parents=True)
        text = "#define LIBBPF_MAJOR_VERSION 1\n#define LIBBPF_MINOR_VERSION 4\n"
        (into / "include/bpf/libbpf_version.h").write_text(text)
        (into / "lib/libbpf.so.1").touch()
        (into / "LICENSE").touch()

    monkeypatch.setattr(bpf_toolchain, "_fetch", fetch)
    cache = tmp_path / "build/libbpf"
    first = bpf_toolchain.ensure_libbpf(cache)
    assert bpf_toolchain.ensure_libbpf(cache) == first
    assert fetched == [cache]


def test_where_libbpf_cannot_be_had_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_release() -> dict[str, str]:
        return {"ID": "other"}

    monkeypatch.setattr(bpf_toolchain, "_system_places", lambda: iter(()))
    monkeypatch.setattr("platform.freedesktop_os_release", no_release)
    with pytest.raises(ToolchainError, match=r"please install .* libbpf-dev.*not a Debian release"):
        bpf_toolchain.ensure_libbpf(tmp_path / "build/libbpf")


@pytest.mark.parametrize("machine", build_hook.BPF_MACHINES)
def test_the_programs_compile_for_every_machine(tmp_path: Path, machine: str) -> None:
    libbpf, clang = bpf_toolchain.ensure_libbpf(), bpf_toolchain.find_clang()
    for source in sorted((ROOT / "bpf").glob("*.bpf.c")):
        target = tmp_path / f"{source.stem}.o"
        build_hook.compile_object(ROOT, clang, libbpf, source, target, machine)
        assert target.read_bytes()[:4] == b"\x7fELF"


def test_what_pip_gives_a_build_in_isolation_is_found_by_what_the_build_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules such as shtab are there in a directory that only PYTHONPATH names."""
    started: list[dict[str, str]] = []
    monkeypatch.setattr(
        "tools.build_hook.subprocess.run", lambda command, env, **_: started.append(env)
    )
    for given, last in (("/pip/isolation", "/pip/isolation"), ("", str(tmp_path / "lab"))):
        monkeypatch.setenv("PYTHONPATH", given)
        build_hook.make_shell_files(tmp_path, "1.2")
        paths = started[-1]["PYTHONPATH"].split(os.pathsep)
        assert paths[0] == str(tmp_path) and paths[-1] == last


@pytest.mark.parametrize(
    ("named", "there", "chosen"),
    [("clang", True, "clang"), ("", True, "musl-gcc"), ("", False, "cc")],
)
def test_the_compiler_that_is_named_then_musls_then_any(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str, there: bool, chosen: str
) -> None:
    if there:
        (tmp_path / "musl-gcc").write_text("#!/bin/sh\n")
        (tmp_path / "musl-gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", named)
    compiler = build_hook.c_compiler()
    assert Path(compiler[0]).name == chosen
    assert ("/usr/include" in compiler) == (chosen == "musl-gcc")


def test_another_compiler_compiles_all_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("proto", "agent_sdk/exec", "daemon/load", "daemon/release", "daemon/oci"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    log = tmp_path / "log"
    for name in ("one", "two"):
        script = f"#!/bin/sh\necho {name} >> {log}\n"
        script += 'while [ "$1" != -o ]; do shift; done\ntouch "$2"\n'
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    for name in ("one", "one", "two", "two"):
        monkeypatch.setenv("CC", str(tmp_path / name))
        build_hook.compile_programs(tmp_path, "1")
        # Times in the file system are no finer than what a compiler of this kind takes.
        for made in ("include/compiler", "include/intent_fields.h"):
            os.utime(tmp_path / "build" / made, (0, 0))
    count = len(build_hook.PROGRAMS)
    assert log.read_text().split() == ["one"] * count + ["two"] * count
