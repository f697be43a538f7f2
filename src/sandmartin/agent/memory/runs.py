"""Sets of pages as runs, and which of some pages are all zero.

A set of runs is canonical: ascending, and no two runs touch. Nothing here takes a Python step per
page but `stretches`, and nothing allocates in proportion to RAM.
"""

from __future__ import annotations

import mmap
import operator
import re
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

PAGE = mmap.PAGESIZE

_ZERO = bytes(PAGE)
_PAGES = struct.Struct(f"{PAGE}s")
_STRETCH = re.compile(b"\x00+|\x01+")


@dataclass(frozen=True)
class Runs:
    """Pages `firsts[i]` up to but not including `ends[i]`, for each i."""

    firsts: array[int]
    ends: array[int]

    @classmethod
    def of(cls, firsts: Iterable[int], ends: Iterable[int]) -> Runs:
        """From ascending runs that may touch each other."""
        begins, stops = array("Q", firsts), array("Q", ends)
        if not any(map(operator.eq, stops, begins[1:])):
            return cls(begins, stops)
        apart = list(map(operator.ne, stops, begins[1:]))
        return cls(
            array("Q", (b for b, new in zip(begins, [True, *apart], strict=True) if new)),
            array("Q", (s for s, last in zip(stops, [*apart, True], strict=True) if last)),
        )

    @property
    def pages(self) -> int:
        return sum(self.ends) - sum(self.firsts)

    @property
    def size_bytes(self) -> int:
        return self.pages * PAGE

    def __len__(self) -> int:
        return len(self.firsts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.firsts, self.ends, strict=True)

    def fit(self, pages: int) -> bool:
        """Whether this is canonical and inside a RAM of so many pages."""
        return (
            len(self.firsts) == len(self.ends)
            and all(map(operator.lt, self.firsts, self.ends))
            and all(map(operator.lt, self.ends, self.firsts[1:]))
            and (not self.ends or self.ends[-1] <= pages)
        )

    def within(self, pages: range) -> Runs:
        """The part that lies in `pages`."""
        begin = bisect_right(self.ends, pages.start)
        end = bisect_left(self.firsts, pages.stop)
        firsts, ends = self.firsts[begin:end], self.ends[begin:end]
        if firsts:
            firsts[0] = max(firsts[0], pages.start)
            ends[-1] = min(ends[-1], pages.stop)
        return Runs(firsts, ends)

    def batches(self, pages: int) -> Iterator[Runs]:
        """The same pages in order, at most so many at a time."""
        counts = map(operator.sub, self.ends, self.firsts)
        #: How many pages there are up to and with each run.
        sums = array("Q", accumulate(counts))
        total = sums[-1] if sums else 0
        for done in range(0, total, pages):
            until = min(done + pages, total)
            # The runs that hold the first and the last page of this batch.
            i, j = bisect_right(sums, done), bisect_left(sums, until)
            first = self.ends[i] - (sums[i] - done)
            yield self.within(range(first, self.ends[j] - (sums[j] - until)))


def stretches(data: memoryview) -> Iterator[tuple[bool, int, int]]:
    """Whole pages as stretches (not all zero, begin, end), in bytes, alternating."""
    marks = bytes(page != _ZERO for (page,) in _PAGES.iter_unpack(data))
    for found in _STRETCH.finditer(marks):
        yield marks[found.start()] == 1, found.start() * PAGE, found.end() * PAGE
