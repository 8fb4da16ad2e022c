"""zram: what the kernel shows, and what is decided from it. Nothing is made here."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcgroupd.config import parse_config
from agentcgroupd.errors import ConfigError
from agentcgroupd.host import zram
from agentcgroupd.host.zram import Swap, Zram, ZramError, ZramStat

PAGE = os.sysconf("SC_PAGE_SIZE")
HEADING = b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
ZRAM_LINE = b"/dev/zram0                              partition\t204796\t\t20480\t\t100\n"
FILE_NAME = b"/srv/with\\040blank/swap"
FILE_LINE = FILE_NAME + b"                 file\t\t1048572\t\t0\t\t-2\n"


def test_no_swap_is_a_heading_alone() -> None:
    assert zram.parse_swaps(HEADING) == ()


def test_swaps_are_read_with_their_units() -> None:
    device, file = zram.parse_swaps(HEADING + ZRAM_LINE + FILE_LINE)
    assert device == Swap("/dev/zram0", 204796 << 10, 20480 << 10, 100) and device.is_zram
    assert file == Swap("/srv/with\\040blank/swap", 1048572 << 10, 0, -2) and not file.is_zram


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"/swap\rfile", "/swap\rfile"),
        (b"/a\x0bb\x0cc\x1cd\xc2\x85", "/a\x0bb\x0cc\x1cd\x85"),
        (b"/swap\xff", r"/swap\xff"),
        (b"/line\\012/dev/zram1", r"/line\012/dev/zram1"),
        (b"/dev/zram-files/swap", "/dev/zram-files/swap"),
    ],
)
def test_a_swap_files_name_is_one_name_whatever_is_in_it(name: bytes, shown: str) -> None:
    device, file = zram.parse_swaps(HEADING + ZRAM_LINE + FILE_LINE.replace(FILE_NAME, name))
    assert device.is_zram
    assert file == Swap(shown, 1048572 << 10, 0, -2) and not file.is_zram
    assert zram.swap_stats((file,)) == ()


@pytest.mark.parametrize("line", [b"/swap file\t1\t0\n", b"/swap partition one 0 -2\n"])
def test_a_line_of_another_form_is_an_error_not_no_swap(line: bytes) -> None:
    with pytest.raises(ValueError):
        zram.parse_swaps(HEADING + line)


def test_mm_stat_of_every_kernel_has_the_fields_that_count() -> None:
    old = "    4096       65    20480 104857600    20480        0        0\n"
    assert zram.parse_mm_stat(old) == ZramStat(4096, 20480, 104857600)
    assert zram.parse_mm_stat(old.replace("\n", "        0        0\n")) == ZramStat(
        4096, 20480, 104857600
    )
    with pytest.raises(ValueError):
        zram.parse_mm_stat("4096 65\n")


@given(st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=16), st.binary())
def test_a_swap_header_tells_its_label(label: str, rest: bytes) -> None:
    head = bytes(1024) + struct.pack("=III16s16s", 1, 51199, 0, os.urandom(16), label.encode())
    page = head.ljust(PAGE - 10, b"\0") + b"SWAPSPACE2"
    assert zram.parse_label(page + rest) == label
    assert zram.parse_label(page[:-10] + b"SWSUSPENDD") is None
    assert zram.parse_label(rest[: PAGE - 1]) is None


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ("[lz4] lz4hc zstd deflate \n", "zstd"),
        ("lzo [lzo-rle] lz4\n", "lzo-rle"),
        ("lz4 [zstd]\n", "zstd"),
        ("[lz4] lz4hc\n", None),
    ],
)
def test_the_densest_that_is_offered_is_chosen(offered: str, chosen: str | None) -> None:
    assert zram.choose_algorithm(offered) == chosen


@pytest.mark.parametrize(
    ("text", "setting"), [("off", "off"), (" Auto ", "auto"), ("2G", 2 << 30), (1 << 30, 1 << 30)]
)
def test_the_setting_is_a_word_or_a_size(text: object, setting: object) -> None:
    assert parse_config({"pool": {"zram": text}}).pool.zram == setting


@pytest.mark.parametrize("text", ["on", "", "0", "-1G", True, ["auto"], "2 parsecs"])
def test_a_wrong_setting_is_named(text: object) -> None:
    with pytest.raises(ConfigError, match=r"pool\.zram: .* allowed is off, auto, or a size"):
        parse_config({"pool": {"zram": text}})


class Host:
    """The host as `prepare` finds it, and a record of what `prepare` does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours: Zram | None = None
        self.swaps: tuple[Swap, ...] = ()
        self.done: list[object] = []
        monkeypatch.setattr(zram, "find", lambda: self.ours)
        monkeypatch.setattr(zram, "swaps", lambda: self.swaps)
        monkeypatch.setattr(zram, "_make", self._make)
        monkeypatch.setattr(zram, "_take_up", lambda device, size: self.done.append("take up"))
        monkeypatch.setattr(zram, "_run", lambda *argv: self.done.append(argv))
        monkeypatch.setattr(zram, "_destroy", lambda device: self.done.append("destroy"))

    def _make(self, size_bytes: int) -> Zram:
        self.done.append(size_bytes)
        return Zram(7)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host without swap."""
    return Host(monkeypatch)


def test_auto_makes_half_of_the_pool_where_there_is_no_swap(host: Host) -> None:
    assert zram.prepare("auto", 1 << 30) == Zram(7)
    assert host.done == [1 << 29]


def test_auto_leaves_the_operators_swap_alone(host: Host) -> None:
    host.swaps = (Swap("/dev/sda2", 1 << 30, 0, -2),)
    assert zram.prepare("auto", 1 << 30) is None
    assert host.done == []


def test_a_size_is_made_beside_the_operators_swap(host: Host) -> None:
    host.swaps = (Swap("/dev/sda2", 1 << 30, 0, -2),)
    assert zram.prepare(64 << 20, 1 << 30) == Zram(7)
    assert host.done == [64 << 20]


@pytest.mark.parametrize("setting", ["auto", 64 << 20])
def test_what_an_earlier_daemon_made_is_taken_up(host: Host, setting: zram.Setting) -> None:
    host.ours = Zram(3)
    assert zram.prepare(setting, 1 << 30) == Zram(3)
    assert host.done == ["take up"]


def test_more_than_twice_the_memory_is_refused(host: Host) -> None:
    with pytest.raises(ZramError, match="twice the host's memory"):
        zram.prepare(1 << 60, 1 << 30)
    assert host.done == []


def test_off_takes_away_what_is_nearly_empty_and_keeps_what_is_not(host: Host) -> None:
    assert zram.prepare("off", 1 << 30) is None
    assert host.done == []
    host.ours = Zram(3)
    host.swaps = (Swap("/dev/zram3", 1 << 30, 65 << 20, 100),)
    with pytest.raises(ZramError, match="holds 65 MiB"):
        zram.prepare("off", 1 << 30)
    assert host.done == []
    host.swaps = (Swap("/dev/zram3", 1 << 30, 1 << 20, 100),)
    assert zram.prepare("off", 1 << 30) is None
    assert host.done == [("swapoff", "/dev/zram3"), "destroy"]


def test_what_cannot_be_done_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Zram:
        raise OSError(30, "Read-only file system", "/sys/class/zram-control/hot_add")

    monkeypatch.setattr(zram, "find", refuse)
    with pytest.raises(ZramError) as caught:
        zram.prepare("auto", 1 << 30)
    assert str(caught.value) == (
        "pool.zram: /sys/class/zram-control/hot_add: Read-only file system"
    )


def test_a_program_that_fails_is_quoted() -> None:
    with pytest.raises(ZramError, match=r"pool\.zram: false failed: exit status 1"):
        zram._run("false")
    with pytest.raises(ZramError, match=r"pool\.zram: no-such-program is not installed"):
        zram._run("no-such-program")
