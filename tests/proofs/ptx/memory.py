"""Memory of a launch, and who accessed it: out of bounds, misaligned, unwritten, in a race."""

import ctypes
from typing import NamedTuple

import numpy as np

CANARY = 0xFFCD7FCB  # new memory: NaN as float32, float16 and bfloat16
MOST_TRACKED = 1 << 27  # words: races are not looked for in larger tensors
EPOCH = 16  # bits of a time below those that count a block's barriers: barriers of its warp


class Fault(Exception):
    """What is wrong in an access, and for which of its lanes."""

    def __init__(self, what: str, wrong, detail: str = ""):
        super().__init__(what)
        self.what, self.detail, self.lane = what, detail, int(np.flatnonzero(wrong)[0])


class Lanes(NamedTuple):
    """The lanes of an access: the threads' numbers in the grid, and when they run: how many
    barriers of the thread block and of the warp they have passed."""

    number: np.ndarray  # in the batch
    thread: np.ndarray
    time: np.ndarray


class _Accesses:
    """For each word the range of threads that accessed it since a barrier, and when."""

    def __init__(self, words: int, threads: int, of_one_block: bool):
        self.first, self.last, self.time = (np.zeros(words, np.uint32) for _ in range(3))
        self.threads = np.uint32(threads)  # of a thread block
        self.of_one_block = of_one_block  # each word is accessed by the threads of one
        self.used = False

    def unordered(self, words, lanes: Lanes):
        """Where another thread's access is not before this one by a barrier; None if nowhere."""
        if not self.used:
            return None
        then = self.time[words]
        if not then.any():
            return None
        if self.of_one_block and not (then >> EPOCH == lanes.time >> EPOCH).any():
            return None
        first, last, thread = self.first[words], self.last[words], lanes.thread
        other = (then != 0) & ((first != thread) | (last != thread))
        if not other.any():
            return None
        for size, shift in ((np.uint32(32), 0), (self.threads, EPOCH)):
            same = (first // size == thread // size) & (last // size == thread // size)
            other &= ~(same & (then >> shift != lanes.time >> shift))
        return other if other.any() else None

    def of_block(self, words, lanes: Lanes):
        """Where all of them are of the lane's thread block."""
        block = lanes.thread // self.threads
        first, last = self.first[words] // self.threads, self.last[words] // self.threads
        return (first == block) & (last == block)

    def set(self, words, lanes: Lanes) -> None:
        self.used = True
        self.first[words], self.last[words], self.time[words] = (
            lanes.thread,
            lanes.thread,
            lanes.time,
        )

    def add(self, words, lanes: Lanes) -> None:
        """To the accesses that are not ordered before these."""
        open_ = self.unordered(words, lanes)
        before = (
            None
            if open_ is None
            else (words[open_], self.first[words][open_], self.last[words][open_])
        )
        self.set(words, lanes)
        for w, low, high in ((words, lanes.thread, lanes.thread), before or (words[:0],) * 3):
            np.minimum.at(self.first, w, low.astype(np.uint32))
            np.maximum.at(self.last, w, high.astype(np.uint32))


def bytes_at(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class Region:
    """Bytes [begin, end) that lanes may access. `grain`: bytes of a word, the smallest that is
    accessed."""

    def __init__(self, begin: int, end: int, grain: int):
        self.begin, self.end = begin, end
        self.shift = grain.bit_length() - 1
        self.start = begin & ~15
        size = (end + 15 & ~15) - self.start
        self.bytes = bytes_at(self.start, size)
        self.unwritten: np.ndarray | None = None  # of words
        self.tracked, self.lanes = False, 0
        # by an instruction: the words that each lane read last
        self.last_read: dict[int, np.ndarray] = {}

    def track(self, threads: int, replicas: bool) -> None:
        """Look for races. With `replicas`, as in global memory, threads may hold copies of what one
        of them updates. Without them it is shared memory."""
        words = len(self.bytes) >> self.shift
        if words > MOST_TRACKED:
            return
        self.tracked = True
        self.written, self.read, self.added = (
            _Accesses(words, threads, not replicas) for _ in range(3)
        )
        self.read_at = (
            np.full(words, -1, np.int32) if replicas else None
        )  # −2: several instructions

    def new_batch(self, lanes: int) -> None:
        self.lanes, self.last_read = lanes, {}

    def words(self, position, size: int, lanes: Lanes):
        """All words of an access, and their lanes."""
        first = position >> self.shift
        count = max(size >> self.shift, 1)
        if count == 1:
            return first, lanes
        words = (first[:, None] + np.arange(count)).reshape(-1)
        return words, Lanes(*(np.repeat(x, count) for x in lanes))

    def view(self, dtype: str) -> np.ndarray:
        return self.bytes.view(dtype)

    def index(self, position, dtype: str, k: int):
        return (position >> (np.dtype(dtype).itemsize.bit_length() - 1)) + k

    def load(self, position, dtype: str, count: int, lanes: Lanes, at: int):
        self.note_read(position, np.dtype(dtype).itemsize * count, lanes, at)
        return [self.view(dtype)[self.index(position, dtype, k)] for k in range(count)]

    def note_read(self, position, size: int, lanes: Lanes, at: int) -> None:
        words, of_words = self.words(position, size, lanes)
        per = len(words) // len(position)
        if self.unwritten is not None and (bad := self.unwritten[words]).any():
            raise Fault("unwritten", bad.reshape(-1, per).any(1), "reads what nobody wrote")
        if not self.tracked:
            return
        bad = self.written.unordered(words, of_words)
        if bad is not None and self.read_at is not None:
            bad &= ~self._read_by_writer(words, of_words, at)
        self._race(bad, per, "reads what another thread wrote")
        self._race(self.added.unordered(words, of_words), per, "reads what another thread adds to")
        if self.read_at is not None:
            before = self.read_at[words]
            open_ = self.read.unordered(words, of_words)
            several = (before != at) & (False if open_ is None else open_)
            self.read_at[words] = np.where(several, -2, at)
            table = self.last_read.setdefault(at, np.full((self.lanes, per), -1))
            table[lanes.number] = words.reshape(-1, per)
        self.read.add(words, of_words)

    def _read_by_writer(self, words, lanes: Lanes, at: int):
        """Whether the thread that wrote a word had read it by this instruction. Several threads may
        hold copies of one number, all read by one instruction, and one of them writes the new one.
        """
        table = self.last_read.get(at)
        if table is None:
            return np.zeros(len(words), bool)
        writer = self.written.last[words].astype(np.int64) - (
            int(lanes.thread[0]) - int(lanes.number[0])
        )
        inside = (writer >= 0) & (writer < len(table)) & self.written.of_block(words, lanes)
        return inside & (table[np.where(inside, writer, 0)] == words[:, None]).any(1)

    def _replicated(self, words, lanes: Lanes):
        """Whether a thread that writes had read the word by the instruction of all its readers."""
        result, of_block = np.zeros(len(words), bool), self.read.of_block(words, lanes)
        for at, table in self.last_read.items():
            there = of_block & (self.read_at[words] == at)
            if there.any():
                result |= there & (table[lanes.number] == words[:, None]).any(1)
        return result

    @staticmethod
    def _race(bad, per: int, detail: str) -> None:
        if bad is not None and bad.any():
            raise Fault("race", bad.reshape(-1, per).any(1), detail)

    def store(self, position, dtype: str, values: list, lanes: Lanes, at: int) -> None:
        view, count = self.view(dtype), len(values)
        indices = [self.index(position, dtype, k) for k in range(count)]
        words, of_words = self.words(position, np.dtype(dtype).itemsize * count, lanes)
        per = len(words) // len(position)
        if self.tracked:
            # threads may store equal copies of a number: no race where it is there already
            changes = [view[i] != v for i, v in zip(indices, values, strict=True)]
            changes = np.repeat(np.any(changes, axis=0), per)
            bad = self.read.unordered(words, of_words)
            if bad is not None and self.read_at is not None:
                bad &= ~self._replicated(words, of_words)
            self._race(
                bad if bad is None else bad & changes, per, "writes what another thread read"
            )
            bad = self.written.unordered(words, of_words)
            self._race(
                bad if bad is None else bad & changes, per, "writes what another thread wrote"
            )
            self._race(
                self.added.unordered(words, of_words), per, "writes what another thread adds to"
            )
            self.written.set(words, of_words)
        for i, v in zip(indices, values, strict=True):
            view[i] = v
        if self.unwritten is not None:
            self.unwritten[words] = False
        for i, v in zip(indices, values, strict=True):
            if (bad := view[i] != v).any():
                one = int(np.flatnonzero(bad)[0])
                detail = f"{v[one]:#x} and {view[i][one]:#x} stored to one address"
                first = (
                    self.written.last[words].reshape(-1, per)[:, 0]
                    if self.tracked
                    else lanes.thread
                )
                of_warp = first[one] // 32 == lanes.thread[one] // 32
                raise Fault("unequal copies" if of_warp else "race", bad, detail)

    def update(self, position, dtype: str, kind: str, values, lanes: Lanes):
        """Atomics, in the order of the lanes: the old values."""
        words, of_words = self.words(position, np.dtype(dtype).itemsize, lanes)
        per = len(words) // len(position)
        if self.unwritten is not None and (bad := self.unwritten[words]).any():
            raise Fault("unwritten", bad.reshape(-1, per).any(1), "adds to what nobody wrote")
        if self.tracked:
            self._race(
                self.written.unordered(words, of_words), per, "adds to what another thread wrote"
            )
            self._race(
                self.read.unordered(words, of_words), per, "adds to what another thread read"
            )
            self.added.add(words, of_words)
        return updated(self.view(dtype), self.index(position, dtype, 0), kind, values)


def updated(view, index, kind: str, values):
    """The first lane of each address, then the second of each, and so on."""
    order = np.argsort(index, kind="stable")
    begins = np.r_[True, np.diff(index[order]) != 0]
    rank = np.arange(len(order)) - np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    before = np.empty_like(values)
    by_rank = order[np.argsort(rank, kind="stable")]
    for lanes in np.split(by_rank, np.cumsum(np.bincount(rank))[:-1]):
        old = view[index[lanes]]
        before[lanes] = old
        view[index[lanes]] = old + values[lanes] if kind == "add" else values[lanes]
    return before
