"""Where the data of sparse files is, in whole chunks, and how it is read and written."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sandmartin.agent.memory.base import put_sparse
from sandmartin.agent.memory.runs import PAGE
from sandmartin.agent.memory.whole import read_at, write_at


def chunks_with_data(file: int, chunk_bytes: int) -> Iterator[int]:
    """The numbers of the chunks that are no hole."""
    size_bytes, at = os.fstat(file).st_size, 0
    while at < size_bytes:
        try:
            data = os.lseek(file, at, os.SEEK_DATA)
        except OSError:
            # There is none any more.
            return
        hole = os.lseek(file, data, os.SEEK_HOLE)
        first = max(data, at) // chunk_bytes
        end = -(-min(hole, size_bytes) // chunk_bytes)
        yield from range(first, end)
        at = end * chunk_bytes


def read_chunk(file: int, number: int, length: int, chunk_bytes: int) -> bytearray | None:
    """A chunk; None when it is all zero. Raises Invalid when the file has become shorter."""
    chunk = bytearray(length)
    read_at(file, memoryview(chunk), number * chunk_bytes)
    return chunk if chunk.count(0) < length else None


def write_chunk(file: int, offset: int, content: bytes) -> None:
    """Write what is not zero, where there was nothing yet. Raises OSError."""
    whole = len(content) // PAGE * PAGE
    put_sparse(file, offset, memoryview(content)[:whole], punch=False)
    write_at(file, content[whole:], offset + whole)
