"""Which mirror is asked for packages of another suite, and what apt's answers mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.debian_suites import Mirror, SuiteError, find_mirror, parse_depends

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
    mirror = find_mirror(tmp_path, {})
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
    assert find_mirror(tmp_path, {}) == Mirror("http://yes.example/debian", "/k.gpg")


def test_disabled_and_foreign_sources_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/a.sources").write_text(
        "Enabled: no\nTypes: deb\nURIs: http://a.example/debian\nSuites: trixie\n\n"
        "Types: deb\nURIs: http://b.example/ubuntu\nSuites: noble\n"
    )
    with pytest.raises(SuiteError, match="AGENTCG_DEBIAN_MIRROR"):
        find_mirror(tmp_path, {})
    given = {"AGENTCG_DEBIAN_MIRROR": "http://c.example/d", "AGENTCG_DEBIAN_KEYRING": "/c"}
    assert find_mirror(tmp_path, given) == Mirror("http://c.example/d", "/c")


def test_depends_field() -> None:
    stanza = (
        "Package: p\nDepends: dracut | initramfs-tools (>= 0.1), linux-base-7.3.4 (= 7.3.4-1), "
        "python3:any\nRecommends: x\n"
    )
    assert parse_depends(stanza) == ["dracut", "linux-base-7.3.4", "python3"]
    assert parse_depends("Package: p\n") == []
