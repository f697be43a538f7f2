"""`python -m sandmartin.context < ARCHIVE > TAR`: an uploaded archive, checked and made plain.

For a child without rights: it reads its standard input, which must be a file, and writes the one
plain tar of its files. A refusal is one JSON object, `message` and `hint`, on standard error, and
exit code 2. Its memory is bounded, as nobody can be sure what a hostile archive makes of a library.
Started as root it takes a user id and becomes that user before it reads anything: Python itself may
be where only root can start it.
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
import resource
import sys

from sandmartin.context.archive import Limits, open_archive
from sandmartin.context.source import InvalidBuild

REFUSED = 2
_MEMORY_BYTES = 2**30


def main() -> int:
    defaults = Limits()
    parser = argparse.ArgumentParser(prog="sandmartin.context", description=__doc__)
    parser.add_argument("--size-bytes", type=int, default=defaults.size_bytes)
    parser.add_argument("--count", type=int, default=defaults.count)
    parser.add_argument("--memory-bytes", type=int, default=_MEMORY_BYTES)
    parser.add_argument("--uid", type=int, help="becomes this user")
    asked = parser.parse_args()
    if asked.uid is not None:
        become(asked.uid)
    resource.setrlimit(resource.RLIMIT_AS, (asked.memory_bytes, asked.memory_bytes))
    limits = Limits(size_bytes=asked.size_bytes, count=asked.count)
    try:
        with open_archive(sys.stdin.buffer, limits) as archive:
            archive.write(sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except InvalidBuild as error:
        return _refuse(error.message, error.hint)
    except MemoryError:
        return _refuse("the archive needs too much memory to read", "send fewer files")
    return 0


def become(uid: int) -> None:
    """Be nobody but `uid`, for good, and without any right."""
    # The names in a zip may need it, and it may be where only root can read.
    codecs.lookup("cp437")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _refuse(message: str, hint: str) -> int:
    json.dump({"message": message, "hint": hint}, sys.stderr)
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
