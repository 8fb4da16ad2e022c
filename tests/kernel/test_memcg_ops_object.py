"""Object of the reclaim hooks: opened, checked, and cut to what a kernel has. No kernel has the
hooks yet, so the kernels here are made up; tests/guest/test_memcg_ops.py tests what hooks decide.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator

import pytest

from agentcgroupd.bpf import abi, features, memcg_ops
from agentcgroupd.bpf.btf import Btf, kernel_btf
from agentcgroupd.bpf.libbpf import libbpf
from agentcgroupd.errors import BpfError

pytestmark = pytest.mark.programs

COMMON = ("handle_cgroup_online", "handle_cgroup_offline", "below_low", "below_min")
V5 = (*COMMON, "get_high_delay_ms")
V7 = (*COMMON, "memcg_charged", "memcg_uncharged")


class Kernel(Btf):
    """Types of this kernel, and a made-up memcg_bpf_ops with some callbacks."""

    def __init__(self, callbacks: tuple[str, ...], place: str = "cgroup") -> None:
        self._callbacks, self._place = callbacks, place

    def has_struct(self, name: str, member: str = "") -> bool:
        if name == "memcg_bpf_ops":
            return not member or member in self._callbacks
        if name == "bpf_struct_ops_link":
            return member == self._place
        return kernel_btf().has_struct(name, member)


@pytest.fixture
def bpf() -> Iterator[memcg_ops.HooksObject]:
    with memcg_ops.HooksObject.open("memcg_ops") as opened:
        yield opened


def test_an_object_of_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "ABI_VERSION", abi.ABI_VERSION + 1)
    with pytest.raises(BpfError, match=f"version {abi.ABI_VERSION - 1} of the interface") as caught:
        memcg_ops.HooksObject.open("memcg_ops")
    assert caught.value.errno == errno.EPROTO


def test_this_kernel_lacks_the_struct() -> None:
    hooks, (state,) = memcg_ops.load()
    assert hooks is None and not state.works
    assert state.name == features.RECLAIM_HOOKS
    assert state.reason == "the kernel has no struct memcg_bpf_ops"


@pytest.mark.parametrize(
    ("callbacks", "works"),
    [
        (V5, True),
        (V7, True),
        (("memcg_charged",), True),
        (("below_min",), True),
        (("handle_cgroup_online", "handle_cgroup_offline"), False),
    ],
)
def test_any_callback_that_decides_is_enough(callbacks: tuple[str, ...], works: bool) -> None:
    (definition,) = features.definitions_of("memcg_ops")
    state = features.gate(definition, Kernel(callbacks))
    assert state.works is works
    if not works:
        assert "no struct memcg_bpf_ops.below_low" in state.reason


@pytest.mark.parametrize("callbacks", [V5, V7, ("below_low",)])
def test_callbacks_that_the_kernel_lacks_are_left_out(
    bpf: memcg_ops.HooksObject, callbacks: tuple[str, ...]
) -> None:
    kept = bpf.keep_callbacks(Kernel(callbacks))
    assert set(kept) == set(callbacks) & set(bpf.programs())
    autoloaded = {
        name
        for name in bpf.programs()
        if libbpf().call("bpf_program__autoload", bpf._program(name))
    }
    assert autoloaded == set(kept)
    size = ctypes.c_size_t()
    start = libbpf().call("bpf_map__initial_value", bpf._map("hooks"), ctypes.byref(size))
    pointers = (ctypes.c_uint64 * (size.value // 8)).from_address(start)
    assert sum(map(bool, pointers)) == len(kept)


def test_a_kernel_that_would_ignore_the_cgroup_gets_no_hooks() -> None:
    hooks, (state,) = memcg_ops.load(btf=Kernel(V7, place=""))
    assert hooks is None
    assert state.reason == "the kernel attaches a struct_ops to the whole system, not to a cgroup"


def test_a_load_that_fails_is_a_reason_not_an_error() -> None:
    # These types are not the kernel's, and libbpf looks for itself.
    hooks, (state,) = memcg_ops.load(btf=Kernel(V7))
    assert hooks is None and not state.works
    assert state.reason.startswith("loading memcg_ops: ESRCH")


def test_without_the_struct_the_rest_of_the_object_loads(bpf: memcg_ops.HooksObject) -> None:
    for program in bpf.programs():
        if program != "decide_for":
            bpf.skip_program(program)
    bpf.load()
    assert bpf.run("decide_for", abi.MemcgDecision(cgroup_id=1 << 40)) == -errno.ENOENT
