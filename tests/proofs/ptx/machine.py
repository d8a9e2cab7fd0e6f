"""Runs a kernel: each register is an array with one number for each lane (thread) of a batch of
thread blocks. Lanes at the same basic block run it together; a block with a barrier or with an
instruction of a whole warp waits until all lanes of the thread block or of the warp are there."""

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from . import arithmetic, matrices, products
from .instructions import Waits
from .memory import CANARY, EPOCH, Fault, Lanes, Region
from .program import Program
from .text import Unsupported

MOST_LANES = 16_384  # of a batch
MOST_SHARED = 64 << 20  # bytes, of a batch
WARP = 32


class Finding(Exception):
    """Something that a GPU must not do."""

    def __init__(self, what: str, place: str, who: str, detail: str = ""):
        super().__init__(f"{what} at {place}, {who}" + (f": {detail}" if detail else ""))
        self.what = what


class Launch(NamedTuple):
    program: Program
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: np.ndarray  # bytes
    shared_bytes: int
    regions: list[Region]  # by address

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]


class Traffic:
    """Accesses of global memory. `asked`: bytes of all lanes; `sectors`: of 32 bytes, of the
    request of each warp."""

    def __init__(self) -> None:
        self.asked, self.sectors = 0, 0
        self._moved: list[np.ndarray] = []

    def add(self, warps, address, size: int) -> None:
        sector = address >> 5  # an aligned access lies in one
        self.asked += size * len(address)
        self.sectors += len(np.unique(np.stack([warps, sector]), axis=1).T)
        self._moved.append(np.unique(sector))

    @staticmethod
    def moved(*parts: "Traffic") -> int:
        """Sectors that were asked for at least once, in any of them."""
        return len(np.unique(np.concatenate([x for part in parts for x in part._moved])))


class _Copy(NamedTuple):
    lanes: np.ndarray
    at: int
    position: np.ndarray
    words: np.ndarray  # [lanes, words]
    group: np.ndarray


def run(launch: Launch, seed: int | None = None, traffic: dict[str, Traffic] | None = None) -> None:
    """With a seed, warps run in a random order between barriers."""
    grid, block = launch.grid, launch.block
    if grid[0] > 0x7FFFFFFF or max(grid[1:]) > 65535 or launch.threads > 1024:
        name = launch.program.kernel.name
        raise ValueError(f"{name}: more blocks or threads than a GPU takes: {grid}, {block}")
    blocks = grid[0] * grid[1] * grid[2]
    if launch.threads % WARP:
        raise Unsupported("the PTX machine does not know warps that are not full")
    size = min(MOST_LANES // launch.threads, MOST_SHARED // max(launch.shared_bytes, 1), blocks)
    random = None if seed is None else np.random.default_rng(seed)
    fault = products.fault_of(launch.program)
    with np.errstate(all="ignore"):
        for first in range(0, blocks, max(size, 1)):
            batch = Batch(launch, first, min(max(size, 1), blocks - first), random, traffic)
            if fault is not None:
                raise batch._finding(*fault, 0)
            batch.run()


def _one_or_all(values: list):
    return values[0] if len(values) == 1 else values


class Batch:
    """Thread blocks that run at the same time. Methods that blocks of code call take the lanes that
    run, the number of the instruction, and a mask of the lanes for which it runs, or None."""

    def __init__(self, launch, first, blocks, random, traffic):
        self.launch, self.program, self.random, self.traffic = (
            launch,
            launch.program,
            random,
            traffic,
        )
        self.threads, self.n = launch.threads, blocks * launch.threads
        self.block = first + np.repeat(np.arange(blocks), self.threads)
        self.thread = np.tile(np.arange(self.threads), blocks)
        number = self.block * self.threads + self.thread
        self.number = number.astype(np.uint32)
        self.time = np.full(self.n, 1 << EPOCH, np.uint32)
        self.alive = np.ones(self.n, bool)
        unset = {bits: np.full(self.n, CANARY).astype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}
        unset[1] = np.zeros(self.n, bool)
        self.registers = [unset[r.bits] for r in self.program.slots]  # `keep` never writes into one
        self.bases = [region.begin for region in launch.regions]
        for region in launch.regions:
            region.new_batch(self.n)
        # 1,024: swizzles look at bits of addresses
        self.stride = -(-max(launch.shared_bytes, 16) // 1024) * 1024
        self.shared_base = (self.block - first) * self.stride
        self.shared_memory = np.full(blocks * self.stride // 4, CANARY, np.uint32)
        begin = self.shared_memory.ctypes.data
        self.shared = Region(begin, begin + self.shared_memory.nbytes, self.program.grain)
        self.shared_begin = begin - self.shared.start
        self.shared.track(self.threads, replicas=False)
        self.shared.unwritten = np.ones(len(self.shared.bytes) >> self.shared.shift, bool)
        self.not_copied = np.zeros(len(self.shared.unwritten), bool)
        self.copies: list[_Copy] = []
        self.copy_group = np.zeros(self.n, np.int64)
        # lanes that stored to shared memory, without a fence before wgmma reads it
        self.not_fenced = np.zeros(self.n, bool)

    # Schedule

    def run(self) -> None:
        waiting = {0: np.arange(self.n)}  # block of code -> lanes
        program = self.program
        while waiting:
            at, lanes = self._next(waiting)
            there = waiting.pop(at)
            if len(lanes) < len(there):
                waiting[at] = np.setdiff1d(there, lanes, assume_unique=True)
            block, everyone = program.kernel.blocks[at], len(lanes) == self.n
            program.hits[at] += 1
            condition = program.blocks[at](self, self.registers, lanes, everyone)
            if condition is None:
                self._arrive(waiting, block.following, lanes)
            else:
                self._arrive(waiting, block.target, lanes[condition])
                self._arrive(waiting, block.following, lanes[~condition])
        if self.copies:
            copy = self.copies[0]
            raise self._finding("a copy that nobody awaits", copy.at, copy.lanes[0])

    def _next(self, waiting: dict[int, np.ndarray]) -> tuple[int, np.ndarray]:
        """The first block of code for which lanes are ready; with a seed any, and some warps."""
        order = sorted(waiting)
        if self.random is not None:
            self.random.shuffle(order)
        for at in order:
            lanes = self._ready(waiting[at], self.program.waits[at])
            if len(lanes):
                if self.random is not None and self.program.waits[at] < Waits.BLOCK:
                    chosen = self.random.random(self.n // WARP) < 0.5
                    some = lanes[chosen[lanes // WARP]]
                    lanes = some if len(some) else lanes
                return at, lanes
        at = order[0]
        number = sum(map(len, self.program.steps[:at]))
        what = (
            "a barrier" if self.program.waits[at] == Waits.BLOCK else "a whole warp's instruction"
        )
        raise self._finding(f"{what} that some threads do not reach", number, waiting[at][0])

    def _ready(self, lanes: np.ndarray, waits: Waits) -> np.ndarray:
        if waits == Waits.NO:
            return lanes
        size = WARP if waits == Waits.WARP else self.threads
        here = np.bincount(lanes // size, minlength=self.n // size)
        alive = self.alive.reshape(-1, size).sum(1)
        if waits == Waits.WARP and ((here > 0) & (alive < WARP)).any():
            raise Unsupported(
                f"{self.program.kernel.name}: the PTX machine does not know exchanges in a warp of "
                "which some threads have ended"
            )
        return lanes[(here == alive)[lanes // size]]

    def _arrive(self, waiting: dict[int, np.ndarray], at: int | None, lanes: np.ndarray) -> None:
        if not len(lanes):
            return
        if at is None:
            self.alive[lanes] = False
        elif at in waiting:
            waiting[at] = np.sort(np.concatenate([waiting[at], lanes]))
        else:
            waiting[at] = lanes

    def _finding(self, what: str, at: int, lane, detail: str = "") -> Finding:
        i, block = self.program.instructions[at], int(self.block[lane])
        x, y, _ = self.launch.grid
        who = (
            f"block ({block % x}, {block // x % y}, {block // (x * y)}), thread {self.thread[lane]}"
        )
        place = f"{self.program.kernel.name} {i.source} (PTX line {i.line}: {i.text.split()[0]})"
        return Finding(what, place, who, detail)

    def keep(self, slot: int, lanes: np.ndarray, everyone: bool, value: np.ndarray) -> None:
        if everyone:
            self.registers[slot] = value
        else:  # a copy, because two registers may hold one array
            kept = self.registers[slot].copy()
            kept[lanes] = value
            self.registers[slot] = kept

    def special(self, name: str, lanes: np.ndarray) -> np.ndarray:
        grid, block = self.launch.grid, self.launch.block
        x, _, axis = name.partition(".")
        k = "xyz".index(axis or "x")
        of_thread, of_block = int(np.prod(block[:k])), int(np.prod(grid[:k]))
        thread, number = self.thread[lanes], self.block[lanes]
        mask = np.uint64(1) << (thread % WARP).astype(np.uint64)
        match x:
            case "%tid":
                return thread // of_thread % block[k]
            case "%ctaid":
                return number // of_block % grid[k]
            case "%ntid":
                return np.full(len(lanes), block[k])
            case "%nctaid":
                return np.full(len(lanes), grid[k])
            case "%laneid":
                return thread % WARP
            case "%warpid":
                return thread // WARP
            case "%lanemask_lt":
                return mask - np.uint64(1)
            case "%lanemask_le":
                return 2 * mask - np.uint64(1)
        raise Unsupported(f"the PTX machine does not know the register {name}")

    # Accesses

    def _lanes(self, lanes: np.ndarray, guard) -> Lanes:
        number = lanes if guard is None else lanes[guard]
        return Lanes(number, self.number[number], self.time[number])

    def _faulty(self, fault: Fault, at: int, lanes: Lanes, where: str) -> Finding:
        what = {"race": "a race", "unwritten": "unwritten memory"}.get(fault.what, fault.what)
        return self._finding(f"{what} ({where} memory)", at, lanes.number[fault.lane], fault.detail)

    def _require(self, right: np.ndarray, what: str, at: int, lanes: Lanes, detail) -> None:
        if not right.all():
            k = int(np.flatnonzero(~right)[0])
            raise self._finding(what, at, lanes.number[k], detail(k))

    def _parts(self, space: str, address, size: int, lanes: Lanes, at: int):
        """(region, positions in it, which of the lanes) of an access; all lanes have a region."""
        self._require(
            address & (size - 1) == 0,
            "a misaligned access",
            at,
            lanes,
            lambda k: f"{size} bytes at {address[k]:#x}",
        )
        if space == "shared":
            inside = (address >= 0) & (address + size <= self.launch.shared_bytes)
            self._require(
                inside,
                "out of bounds (shared memory)",
                at,
                lanes,
                lambda k: f"{size} bytes at {address[k]} of {self.launch.shared_bytes}",
            )
            yield (
                self.shared,
                address + self.shared_base[lanes.number] + self.shared_begin,
                slice(None),
            )
            return
        first = bisect.bisect_right(self.bases, int(address[0])) - 1
        if first >= 0:  # most often all lanes access one tensor
            region = self.launch.regions[first]
            if region.begin <= address.min() and address.max() + size <= region.end:
                yield region, address - region.start, slice(None)
                return
        number = np.searchsorted(self.bases, address, "right") - 1
        ends = np.array([region.end for region in self.launch.regions] or [0])
        inside = (number >= 0) & (address + size <= ends[number])
        self._require(
            inside,
            "out of bounds (global memory)",
            at,
            lanes,
            lambda k: self._near(int(address[k]), size),
        )
        for i in np.unique(number):
            some, region = np.flatnonzero(number == i), self.launch.regions[i]
            yield region, address[some] - region.start, some

    def _near(self, address: int, size: int) -> str:
        regions = self.launch.regions
        if not regions:
            return "no tensors"
        i = max(bisect.bisect_right(self.bases, address) - 1, 0)
        nearest = min(regions[i : i + 2], key=lambda r: max(r.begin - address, address - r.end))
        distance, extent = address - nearest.begin, nearest.end - nearest.begin
        return f"{size} bytes, {distance} after the first of a tensor of {extent}"

    def _accesses(
        self, space: str, what: str, at: int, lanes: Lanes, address, size: int
    ) -> Iterator[tuple[Region, np.ndarray, Lanes, slice | np.ndarray]]:
        if self.traffic is not None and space == "global":
            self.traffic.setdefault(what, Traffic()).add(lanes.thread // WARP, address, size)
        for region, position, some in self._parts(space, address, size, lanes, at):
            yield region, position, Lanes(*(x[some] for x in lanes)), some

    def _load(self, space, lanes, at, guard, dtype, count, address):
        chosen = self._lanes(lanes, guard)
        address = address if guard is None else address[guard]
        values = [np.zeros(len(address), dtype) for _ in range(count)]
        if len(address):
            size = np.dtype(dtype).itemsize * count
            for region, position, of, some in self._accesses(
                space, "loads", at, chosen, address, size
            ):
                try:
                    if space == "shared" and self.copies:
                        self._check_copied(position, size)
                    for value, part in zip(
                        values, region.load(position, dtype, count, of, at), strict=True
                    ):
                        value[some] = part
                except Fault as fault:
                    raise self._faulty(fault, at, of, space) from None
        if guard is not None:
            everywhere = [np.zeros(len(lanes), dtype) for _ in range(count)]
            for whole, part in zip(everywhere, values, strict=True):
                whole[guard] = part
            values = everywhere
        return values

    def load_global(self, *arguments):
        return _one_or_all(self._load("global", *arguments))

    def load_shared(self, *arguments):
        return _one_or_all(self._load("shared", *arguments))

    def load_param(self, lanes, at, guard, dtype, count, address):
        size = np.dtype(dtype).itemsize
        if (address == address[0]).all():  # most often
            begin = int(address[0])
            values = np.frombuffer(self.launch.params, dtype, count, begin)
            return _one_or_all([np.full(len(lanes), value) for value in values])
        bytes_ = [address[:, None] + size * k + np.arange(size) for k in range(count)]
        values = [self.launch.params[b].view(dtype)[:, 0] for b in bytes_]
        return _one_or_all(values)

    def _store(self, space, lanes, at, guard, dtype, count, address, *values):
        chosen = self._lanes(lanes, guard)
        if guard is not None:
            address, values = address[guard], [v[guard] for v in values]
        if not len(address):
            return
        if space == "shared":
            self.not_fenced[chosen.number] = True
        size = np.dtype(dtype).itemsize * count
        for region, position, of, some in self._accesses(
            space, "stores", at, chosen, address, size
        ):
            try:
                region.store(position, dtype, [v[some] for v in values], of, at)
            except Fault as fault:
                raise self._faulty(fault, at, of, space) from None

    def store_global(self, *arguments):
        self._store("global", *arguments)

    def store_shared(self, *arguments):
        self._store("shared", *arguments)

    def atomic(self, lanes, at, guard, space, kind, dtype, scope, address, values):
        chosen = self._lanes(lanes, guard)
        if guard is not None:
            address, values = address[guard], values[guard]
        before = np.zeros(len(address), dtype)
        if len(address):
            if scope == "cta" and space == "global" and self.launch.grid != (1, 1, 1):
                raise self._finding(
                    "an atomic of one block in a grid of several", at, chosen.number[0]
                )
            size = np.dtype(dtype).itemsize
            for region, position, of, some in self._accesses(
                space, "atomics", at, chosen, address, size
            ):
                try:
                    before[some] = region.update(position, dtype, kind, values[some], of)
                except Fault as fault:
                    raise self._faulty(fault, at, of, space) from None
        if guard is None:
            return before
        everywhere = np.zeros(len(lanes), dtype)
        everywhere[guard] = before
        return everywhere

    # Asynchronous copies

    def copy(self, lanes, at, guard, size, to, address, read):
        """`read` bytes from global to shared memory, then zeros; there when it is awaited."""
        chosen = self._lanes(lanes, guard)
        if guard is not None:
            to, address, read = to[guard], address[guard], read[guard]
        if not len(to):
            return
        words = np.zeros((len(to), size // 4), np.uint32)
        if (read == size).all():
            parts = self._load("global", chosen.number, at, None, "u4", size // 4, address)
            words[:] = np.stack(parts, -1)
        else:
            for k in range(size // 2):
                some = read > 2 * k
                (part,) = self._load("global", chosen.number, at, some, "u2", 1, address + 2 * k)
                words.view(np.uint16)[some, k] = part[some]
        ((region, position, _),) = self._parts("shared", to, size, chosen, at)
        of_words, expanded = region.words(position, size, chosen)
        bad = region.read.unordered(of_words, expanded)
        if bad is not None:
            lane = expanded.number[np.flatnonzero(bad)[0]]
            raise self._finding(
                "a race (shared memory)", at, lane, "copies to what another thread reads"
            )
        self.not_copied[of_words] = True
        self.copies.append(
            _Copy(chosen.number, at, position, words, self.copy_group[chosen.number])
        )

    def _check_copied(self, position, size: int) -> None:
        words = (position >> self.shared.shift)[:, None] + np.arange(
            max(size >> self.shared.shift, 1)
        )
        if (bad := self.not_copied[words].any(1)).any():
            raise Fault("a copy that was not awaited", bad)

    def commit_copies(self, lanes, at, guard):
        self.copy_group[lanes if guard is None else lanes[guard]] += 1

    def await_copies(self, lanes, at, guard, left):
        """All but the last `left` groups; all copies if it is −1."""
        active = np.zeros(self.n, bool)
        active[lanes if guard is None else lanes[guard]] = True
        remaining = []
        for copy in self.copies:
            done = active[copy.lanes]
            if left >= 0:
                done &= copy.group < self.copy_group[copy.lanes] - left
            if done.any():
                of, position = self._lanes(copy.lanes, done), copy.position[done]
                values = [
                    np.ascontiguousarray(copy.words[done, k]) for k in range(copy.words.shape[1])
                ]
                try:
                    self.shared.store(position, "u4", values, of, copy.at)
                except Fault as fault:
                    raise self._faulty(fault, copy.at, of, "shared") from None
                self.not_copied[self.shared.words(position, 4 * len(values), of)[0]] = False
            if not done.all():
                lanes_, position, words, group = (x[~done] for x in (copy.lanes, *copy[2:]))
                remaining.append(_Copy(lanes_, copy.at, position, words, group))
        self.copies = remaining

    # Barriers

    def barrier(self, lanes, at, guard):
        self.time[lanes] += 1 << EPOCH

    def warp_barrier(self, lanes, at, guard):
        self.time[lanes] += 1

    def fence_async(self, lanes, at, guard):
        self.not_fenced[lanes if guard is None else lanes[guard]] = False

    def nothing(self, lanes, at, guard):
        pass

    # Matrices

    def load_matrices(self, lanes, at, guard, count, flip, address):
        """Matrices of 8 × 8 elements of 16 bits, from rows at the addresses of the first 8·count
        lanes."""
        rows = lanes.reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        chosen = address.reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        words = np.stack(self._load("shared", rows, at, None, "u4", 4, chosen), -1).reshape(
            -1, count, 8, 4
        )
        words = matrices.transposed(words) if flip == "True" else words
        results = [np.ascontiguousarray(words[:, k]).reshape(-1) for k in range(count)]
        return _one_or_all(results)

    def store_matrices(self, lanes, at, guard, count, flip, address, *values):
        words = np.stack([v.reshape(-1, 8, 4) for v in values], 1)
        words = np.ascontiguousarray(
            matrices.transposed(words) if flip == "True" else words
        ).reshape(-1, 4)
        rows = lanes.reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        chosen = address.reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        self._store("shared", rows, at, None, "u4", 4, chosen, *np.ascontiguousarray(words.T))

    def wgmma(self, lanes, at, guard, dtype, n, n_major, descriptor, keep, *registers):
        """Four warps: C [64, n] += A [64, 16] B [16, n]; A in registers, B in shared memory."""
        groups = lanes.reshape(-1, 4 * WARP)
        descriptors = descriptor.reshape(groups.shape)
        if (descriptors != descriptors[:, :1]).any():
            raise self._finding("descriptors that differ in a warp group", at, lanes[0])
        not_fenced = np.any(self.not_fenced.reshape(-1, self.threads), axis=1)
        if not_fenced[lanes // self.threads].any():
            raise self._finding("wgmma of shared memory without a fence", at, lanes[0])
        offsets = [
            matrices.operand_offsets(int(d), n, bool(n_major)).reshape(-1)
            for d in descriptors[:, 0]
        ]
        readers = np.repeat(groups[:, 0], 16 * n)
        (bits,) = self._load("shared", readers, at, None, "u2", 1, np.concatenate(offsets))
        values = bits.view("f2") if dtype == "f16" else arithmetic.from_bfloat16(bits)
        b = values.astype("f8").reshape(-1, 16, n)
        return matrices.wgmma(registers[:4], b, registers[4:], keep, dtype)
