"""Kernels for the guest: the choice of one, and its unpacking."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest

from tests.guest import kernel
from tools.debian_suites import SuiteError

RELEASES = [
    "6.9.1+deb13-cloud-amd64",
    "6.12.117+deb13-cloud-amd64",
    "7.3.4+deb13-cloud-amd64",
    "7.3.10+deb13-cloud-amd64",
    "7.30.1+deb13-cloud-amd64",
]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("6.12", "6.12.117+deb13-cloud-amd64"),
        ("7.3", "7.3.10+deb13-cloud-amd64"),
        ("7.3.4", "7.3.4+deb13-cloud-amd64"),
        ("7", "7.30.1+deb13-cloud-amd64"),
        ("6.1", None),
    ],
)
def test_latest_compares_numbers(spec: str, expected: str | None) -> None:
    assert kernel.latest(spec, RELEASES) == expected


@pytest.mark.parametrize("spec", ["", "latest", "../x", "7.", "7.3.4+deb13"])
def test_bad_spec_says_what_is_expected(spec: str, tmp_path: Path) -> None:
    with pytest.raises(kernel.KernelError, match="expected 'newest' or a version"):
        kernel.ensure(spec, cache=tmp_path)


def test_only_complete_kernels_count(tmp_path: Path) -> None:
    for release in RELEASES[1:4]:
        (tmp_path / "kernels" / release).mkdir(parents=True)
    (tmp_path / "newest").write_text(f"{RELEASES[3]}\n")
    assert kernel.cached(tmp_path, "newest") is None
    assert kernel.cached(tmp_path, "7.3") is None
    (tmp_path / "kernels" / RELEASES[2] / "complete").touch()
    found = kernel.cached(tmp_path, "7.3")
    assert found is not None
    assert found.release == RELEASES[2]
    (tmp_path / "kernels" / RELEASES[3] / "complete").touch()
    newest = kernel.cached(tmp_path, "newest")
    assert newest is not None
    assert newest.modules == tmp_path / "kernels" / RELEASES[3] / "lib/modules" / RELEASES[3]


def test_cache_directory() -> None:
    assert kernel.cache_dir({"AGENTCG_GUEST_DIR": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert kernel.cache_dir({"XDG_CACHE_HOME": "/b"}) == Path("/b/agentcgroup/guest")
    assert kernel.cache_dir({}) == Path.home() / ".cache/agentcgroup/guest"


def test_parts_of_a_split_kernel() -> None:
    release = "7.3.4+deb13-cloud-amd64"
    tree = {
        "linux-image-cloud-amd64": [f"linux-image-{release}", "linux-modules-cloud-amd64"],
        f"linux-image-{release}": [
            "dracut",
            f"linux-binary-{release}",
            f"linux-modules-{release}",
        ],
    }
    parts = kernel.parts_of("linux-image-cloud-amd64", lambda name: tree.get(name, []))
    assert parts == [f"linux-{part}-{release}" for part in ("binary", "image", "modules")]


def test_parts_of_a_whole_kernel() -> None:
    name = "linux-image-6.12.117+deb13-cloud-amd64"
    assert kernel.parts_of(name, lambda _: ["kmod", "linux-base"]) == [name]


def bzimage(payload: bytes) -> bytes:
    """The least that passes for a kernel image: three setup sectors, the payload 16 bytes later."""
    image = bytearray(4 * 512)
    image[0x1F1] = 3
    image[0x202:0x206] = b"HdrS"
    image[0x248:0x250] = struct.pack("<II", 16, len(payload))
    return bytes(image) + bytes(16) + payload + b"what follows"


def test_vmlinux_is_found_through_the_setup_header() -> None:
    elf = b"\x7fELF" + bytes(range(256)) * 10
    payload = gzip.compress(elf) + struct.pack("<I", len(elf))
    assert kernel.extract_vmlinux(bzimage(payload)) == elf
    assert kernel.extract_vmlinux(elf) == elf


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (bytes(0x300), "neither ELF nor bzImage"),
        (bzimage(b"\x02!L\x18 lz4 it is"), "is not supported"),
        (bzimage(gzip.compress(b"text") + bytes(4)), "not an ELF"),
    ],
)
def test_other_images_are_named(image: bytes, message: str) -> None:
    with pytest.raises(kernel.KernelError, match=message):
        kernel.extract_vmlinux(image)


def test_a_mirror_out_of_reach_is_a_kernel_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object) -> kernel.Kernel:
        raise SuiteError("no answer")

    monkeypatch.setattr(kernel, "_fetch", fetch)
    with pytest.raises(kernel.KernelError, match="no answer"):
        kernel.ensure("6.12", cache=tmp_path)
