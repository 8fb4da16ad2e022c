"""Which kernel is chosen, from which mirror, and how it is unpacked."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest

from tests.guest import kernel

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


DEB822 = """\
# a comment
Types: deb
URIs: http://mirror.example/debian-security
Suites: trixie-security
Components: main

Types: deb deb-src
URIs: http://mirror.example/debian
# another
Suites: trixie trixie-updates
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
"""


def test_mirror_from_deb822_keeps_a_key_in_place(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/debian.sources").write_text(DEB822)
    mirror = kernel.find_mirror(tmp_path, {})
    assert mirror.uris == "http://mirror.example/debian"
    stanza = mirror.stanza("trixie-backports")
    assert "Suites: trixie-backports\n" in stanza
    assert stanza.endswith(" -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n")


def test_mirror_from_one_line_sources(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(
        "# deb http://no.example/debian trixie main\n"
        "deb http://sec.example/debian-security bookworm-security main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://yes.example/debian bookworm main contrib\n"
    )
    assert kernel.find_mirror(tmp_path, {}) == kernel.Mirror("http://yes.example/debian", "/k.gpg")


def test_disabled_and_foreign_sources_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/a.sources").write_text(
        "Enabled: no\nTypes: deb\nURIs: http://a.example/debian\nSuites: trixie\n\n"
        "Types: deb\nURIs: http://b.example/ubuntu\nSuites: noble\n"
    )
    with pytest.raises(kernel.KernelError, match="AGENTCG_DEBIAN_MIRROR"):
        kernel.find_mirror(tmp_path, {})
    given = {"AGENTCG_DEBIAN_MIRROR": "http://c.example/d", "AGENTCG_DEBIAN_KEYRING": "/c"}
    assert kernel.find_mirror(tmp_path, given) == kernel.Mirror("http://c.example/d", "/c")


def test_depends_field() -> None:
    stanza = (
        "Package: p\nDepends: dracut | initramfs-tools (>= 0.1), linux-base-7.3.4 (= 7.3.4-1), "
        "python3:any\nRecommends: x\n"
    )
    assert kernel.parse_depends(stanza) == ["dracut", "linux-base-7.3.4", "python3"]
    assert kernel.parse_depends("Package: p\n") == []


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
    """The least that looks like one: three setup sectors, the payload 16 bytes after them."""
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
