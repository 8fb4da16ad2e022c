"""`python -m tests.standin.worker LIBRARY SEED STEPS QUOTA REFUSES`: a program that uses GPU memory
in random order, beside a model of what the daemon's account must say.

Waits for a line on stdin, takes the steps, prints the model's account as JSON, and waits for
another line with its memory still held.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

GRAIN = 512
OUT_OF_MEMORY = 2


class Flat(ctypes.Structure):
    """CUDA_ARRAY_DESCRIPTOR"""

    _fields_ = (
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("format", ctypes.c_int),
        ("channels", ctypes.c_uint),
    )


class Deep(ctypes.Structure):
    """CUDA_ARRAY3D_DESCRIPTOR"""

    _fields_ = (
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("depth", ctypes.c_size_t),
        ("format", ctypes.c_int),
        ("channels", ctypes.c_uint),
        ("flags", ctypes.c_uint),
    )


class Properties(ctypes.Structure):
    """CUmemAllocationProp, its start."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handles", ctypes.c_int),
        ("location", ctypes.c_int),
        ("id", ctypes.c_int),
        ("rest", ctypes.c_uint64 * 2),
    )


def grain(size: int) -> int:
    """The bytes that the stand-in for the driver takes for an allocation of `size`."""
    return -(-size // GRAIN) * GRAIN


@dataclass
class Held:
    """A handle that holds memory."""

    kind: str
    handle: int
    size: int
    context: int
    mapped: list[int] = field(default_factory=list)
    released: bool = False


class Model:
    """The account that the daemon must have of this process."""

    def __init__(self, library: str, quota: int, refuses: bool) -> None:
        self.cuda = ctypes.CDLL(library)
        self.cuda.standin_entered.restype = ctypes.c_long
        self.cuda.standin_used.restype = ctypes.c_size_t
        self.quota, self.refuses = quota, refuses
        self.used = self.peak = self.refused = self.over = self.allocations = self.frees = 0
        self.held: list[Held] = []
        self.contexts: list[int] = []
        self.next_address = 0x100000000000

    @property
    def current(self) -> int:
        """The current context; 0: none."""
        return self.contexts[-1] if self.contexts else 0

    def allocate(self, kind: str, size: int, call: Callable[[Any], int]) -> None:
        """Try one allocation and compare its outcome with the one that it must have."""
        out = ctypes.c_uint64(0xDEAD)
        entered = self.cuda.standin_entered()
        result = call(ctypes.byref(out))
        fits = self.used + size <= self.quota
        went_in = self.cuda.standin_entered() != entered
        if not fits and self.refuses:
            assert result == OUT_OF_MEMORY and not went_in, (kind, size, self.used, result)
            assert out.value == 0xDEAD
            self.refused += 1
            return
        assert went_in and result == 0, (kind, size, self.used, result)
        self.over += not fits
        self.used += size
        self.peak = max(self.peak, self.used)
        self.allocations += 1
        context = 0 if kind == "memory" else self.current
        self.held.append(Held(kind, out.value, size, context))

    def drop(self, held: Held) -> None:
        """Note that a handle holds nothing any more."""
        self.held.remove(held)
        self.used -= held.size
        self.frees += 1


POINTER_CALLS = (
    "cuMemAlloc_v2",
    "cuMemAllocManaged",
    "cuMemAllocAsync",
    "cuMemAllocAsync_ptsz",
    "cuMemAllocFromPoolAsync",
    "cuMemAllocFromPoolAsync_ptsz",
)
SIZES = (1, 511, 512, 4096, 1 << 20, (1 << 20) + 7, 64 << 20)


def pointer(model: Model, chance: random.Random) -> None:
    """Allocate memory that is used by its address."""
    call, size = getattr(model.cuda, chance.choice(POINTER_CALLS)), chance.choice(SIZES)
    model.allocate("pointer", grain(size), lambda o: call(o, ctypes.c_uint64(size), None, None))


def pitched(model: Model, chance: random.Random) -> None:
    """Allocate memory in rows."""
    pitch, wide, high = ctypes.c_uint64(), chance.randrange(1, 2000), chance.randrange(1, 300)
    call = model.cuda.cuMemAllocPitch_v2
    rows = (ctypes.c_uint64(wide), ctypes.c_uint64(high))
    model.allocate("pointer", grain(wide) * high, lambda o: call(o, ctypes.byref(pitch), *rows, 4))


def physical(model: Model, chance: random.Random) -> None:
    """Create memory that is to be mapped."""
    where, size, call = Properties(1, 0, 1, 0), chance.choice(SIZES), model.cuda.cuMemCreate
    u64 = ctypes.c_uint64
    model.allocate("memory", grain(size), lambda o: call(o, u64(size), ctypes.byref(where), u64(0)))


def array(model: Model, chance: random.Random) -> None:
    """Create an array of one to three dimensions, or one with smaller images of itself."""
    wide, high, cuda = chance.randrange(1, 2000), chance.randrange(1, 300), model.cuda
    kind = chance.randrange(3)
    if kind == 0:
        flat = Flat(wide, chance.choice((0, high)), 16, 2)
        size = grain(wide * max(1, flat.height) * 2 * 2)
        model.allocate("array", size, lambda o: cuda.cuArrayCreate_v2(o, ctypes.byref(flat)))
    elif kind == 1:
        deep = Deep(wide, high, chance.choice((0, 3)), 32, 4, 0)
        size = grain(wide * high * max(1, deep.depth) * 4 * 4)
        model.allocate("array", size, lambda o: cuda.cuArray3DCreate_v2(o, ctypes.byref(deep)))
    else:
        deep, levels = Deep(wide, high, 0, 1, 1, 0), chance.randrange(1, 6)
        total = sum(max(1, wide >> i) * max(1, high >> i) for i in range(levels))
        call = cuda.cuMipmappedArrayCreate
        model.allocate("mipmap", grain(total), lambda o: call(o, ctypes.byref(deep), levels))


def context(model: Model, chance: random.Random) -> None:
    """Begin a context, or end one with all that it holds."""
    cuda, out = model.cuda, ctypes.c_uint64()
    if len(model.contexts) < 8 and chance.random() < 0.7:
        assert cuda.cuCtxCreate_v2(ctypes.byref(out), 0, 0) == 0
        model.contexts.append(out.value)
    elif model.contexts:
        ended = model.contexts.pop()
        assert cuda.cuCtxDestroy_v2(ctypes.c_uint64(ended)) == 0
        for held in [h for h in model.held if h.context == ended]:
            model.held.remove(held)
            model.used -= held.size


def nonsense(model: Model, _: random.Random) -> None:
    """Free an address that was never given out: the driver refuses, and the account stays."""
    assert model.cuda.cuMemFree_v2(ctypes.c_uint64(0x700000000000 + 65535 * 4096)) != 0


def any_release(model: Model, chance: random.Random) -> None:
    """Take one step towards the end of any handle that is held."""
    if model.held:
        release(model, chance.choice(model.held), chance)


STEPS: dict[Callable[[Model, random.Random], None], int] = {
    pointer: 7,
    pitched: 1,
    physical: 2,
    array: 3,
    context: 1,
    nonsense: 1,
    any_release: 6,
}
"""Step -> how often it is taken, against the others."""


def step(model: Model, chance: random.Random) -> None:
    """Do one random thing that a program may do."""
    (do,) = chance.choices(list(STEPS), list(STEPS.values()))
    do(model, chance)


def release(model: Model, held: Held, chance: random.Random) -> None:
    """Take one step towards the end of a handle."""
    cuda, u64 = model.cuda, ctypes.c_uint64
    if held.kind == "pointer":
        name = chance.choice(("cuMemFree_v2", "cuMemFreeAsync", "cuMemFreeAsync_ptsz"))
        assert getattr(cuda, name)(u64(held.handle), None) == 0
        model.drop(held)
    elif held.kind == "array":
        assert cuda.cuArrayDestroy(u64(held.handle)) == 0
        model.drop(held)
    elif held.kind == "mipmap":
        assert cuda.cuMipmappedArrayDestroy(u64(held.handle)) == 0
        model.drop(held)
    elif not held.mapped and not held.released and chance.random() < 0.5:
        for _ in range(2):
            at, model.next_address = model.next_address, model.next_address + (1 << 32)
            assert cuda.cuMemMap(u64(at), u64(1 << 21), u64(0), u64(held.handle), u64(0)) == 0
            held.mapped.append(at)
    elif not held.released and chance.random() < 0.7:
        # Memory that is mapped stays, though its handle is gone.
        assert cuda.cuMemRelease(u64(held.handle)) == 0
        held.released = True
        if not held.mapped:
            model.drop(held)
    elif held.mapped:
        assert cuda.cuMemUnmap(u64(held.mapped.pop()), u64(1 << 21)) == 0
        if held.released and not held.mapped:
            model.drop(held)


def main(library: str, seed: int, steps: int, quota: int, refuses: int) -> int:
    """Take the steps and print the account."""
    sys.stdin.readline()
    model, chance = Model(library, quota, refuses == 1), random.Random(seed)
    for _ in range(steps):
        step(model, chance)
    held = sum(h.size for h in model.held)
    assert held == model.used
    names = ("used", "peak", "refused", "over", "allocations", "frees")
    print(json.dumps({name: getattr(model, name) for name in names}), flush=True)
    sys.stdin.readline()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:6])))
