"""`python -m tests.standin.worker LIBRARY SEED STEPS QUOTA REFUSES`: a program that uses GPU memory
in random order beside a model of what the accounts must say.

Waits for a line on stdin before it starts and, with its memory still held, before it ends. Prints
one JSON object for each.
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

    _fields_ = (("width", ctypes.c_size_t), ("height", ctypes.c_size_t), ("format", ctypes.c_int),
                ("channels", ctypes.c_uint))  # fmt: skip


class Deep(ctypes.Structure):
    """CUDA_ARRAY3D_DESCRIPTOR"""

    _fields_ = (("width", ctypes.c_size_t), ("height", ctypes.c_size_t), ("depth", ctypes.c_size_t),
                ("format", ctypes.c_int), ("channels", ctypes.c_uint), ("flags", ctypes.c_uint))  # fmt: skip


class Properties(ctypes.Structure):
    """CUmemAllocationProp, its start."""

    _fields_ = (("type", ctypes.c_int), ("handles", ctypes.c_int), ("location", ctypes.c_int),
                ("id", ctypes.c_int), ("rest", ctypes.c_uint64 * 2))  # fmt: skip


def grain(size: int) -> int:
    """As the driver places it."""
    return -(-size // GRAIN) * GRAIN


@dataclass
class Held:
    """Something that holds memory."""

    kind: str
    handle: int
    size: int
    context: int
    mapped: list[int] = field(default_factory=list)
    released: bool = False


class Model:
    """What the account of this process must be."""

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
        """The context that is current."""
        return self.contexts[-1] if self.contexts else 0

    def allocate(self, kind: str, size: int, call: Callable[[Any], int]) -> None:
        """One attempt, compared with what must come of it."""
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
        """It holds nothing any more."""
        self.held.remove(held)
        self.used -= held.size
        self.frees += 1


def step(model: Model, chance: random.Random) -> None:
    """One random thing that a program may do."""
    cuda, size = model.cuda, chance.choice((1, 511, 512, 4096, 1 << 20, (1 << 20) + 7, 64 << 20))
    wide, high = chance.randrange(1, 2000), chance.randrange(1, 300)
    choice = chance.randrange(20)
    u64 = ctypes.c_uint64
    if choice < 4:
        name = chance.choice(("cuMemAlloc_v2", "cuMemAllocManaged"))
        model.allocate("pointer", grain(size), lambda o: getattr(cuda, name)(o, u64(size), 1))
    elif choice < 6:
        name = chance.choice(("cuMemAllocAsync", "cuMemAllocAsync_ptsz"))
        model.allocate("pointer", grain(size), lambda o: getattr(cuda, name)(o, u64(size), None))
    elif choice == 6:
        name = chance.choice(("cuMemAllocFromPoolAsync", "cuMemAllocFromPoolAsync_ptsz"))
        call = getattr(cuda, name)
        model.allocate("pointer", grain(size), lambda o: call(o, u64(size), None, None))
    elif choice == 7:
        pitch = u64()
        call = cuda.cuMemAllocPitch_v2
        model.allocate("pointer", grain(wide) * high,
                       lambda o: call(o, ctypes.byref(pitch), u64(wide), u64(high), 4))  # fmt: skip
    elif choice == 8:
        where = Properties(1, 0, 1, 0)
        model.allocate("memory", grain(size),
                       lambda o: cuda.cuMemCreate(o, u64(size), ctypes.byref(where), u64(0)))  # fmt: skip
    elif choice == 9:
        flat = Flat(wide, chance.choice((0, high)), 16, 2)
        model.allocate("array", grain(wide * max(1, flat.height) * 2 * 2),
                       lambda o: cuda.cuArrayCreate_v2(o, ctypes.byref(flat)))  # fmt: skip
    elif choice == 10:
        deep = Deep(wide, high, chance.choice((0, 3)), 32, 4, 0)
        model.allocate("array", grain(wide * high * max(1, deep.depth) * 4 * 4),
                       lambda o: cuda.cuArray3DCreate_v2(o, ctypes.byref(deep)))  # fmt: skip
    elif choice == 11:
        deep, levels = Deep(wide, high, 0, 1, 1, 0), chance.randrange(1, 6)
        total = sum(max(1, wide >> i) * max(1, high >> i) for i in range(levels))
        model.allocate("mipmap", grain(total),
                       lambda o: cuda.cuMipmappedArrayCreate(o, ctypes.byref(deep), levels))  # fmt: skip
    elif choice == 12 and len(model.contexts) < 8:
        out = u64()
        assert cuda.cuCtxCreate_v2(ctypes.byref(out), 0, 0) == 0
        model.contexts.append(out.value)
    elif choice == 13 and model.contexts and chance.random() < 0.5:
        ended = model.contexts.pop()
        assert cuda.cuCtxDestroy_v2(u64(ended)) == 0
        for held in [h for h in model.held if h.context == ended]:
            model.held.remove(held)
            model.used -= held.size
    elif choice == 14:
        # Freed twice, or never given out: the driver says no, and nothing may be given back for it.
        assert cuda.cuMemFree_v2(u64(0x700000000000 + 65535 * 4096)) != 0
    elif model.held:
        release(model, chance.choice(model.held), chance)


def release(model: Model, held: Held, chance: random.Random) -> None:
    """One step towards the end of something that is held."""
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
        # What is mapped stays, though its handle is gone.
        assert cuda.cuMemRelease(u64(held.handle)) == 0
        held.released = True
        if not held.mapped:
            model.drop(held)
    elif held.mapped:
        assert cuda.cuMemUnmap(u64(held.mapped.pop()), u64(1 << 21)) == 0
        if held.released and not held.mapped:
            model.drop(held)


def main(library: str, seed: int, steps: int, quota: int, refuses: bool) -> int:
    """Run."""
    sys.stdin.readline()
    model, chance = Model(library, quota, refuses), random.Random(seed)
    for _ in range(steps):
        step(model, chance)
    held = sum(h.size for h in model.held)
    assert held == model.used
    names = ("used", "peak", "refused", "over", "allocations", "frees")
    print(json.dumps({name: getattr(model, name) for name in names}), flush=True)
    sys.stdin.readline()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:5]), refuses=sys.argv[5] == "1"))
