"""What a user of E2B's own package waits for, in milliseconds; told as JSON, by what it is.

Runs in an environment that has nothing of ours. The number of runs is the one argument.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from contextlib import contextmanager

from e2b import AsyncSandbox, Sandbox

RUNS = int(sys.argv[1])
SIZE = 64 << 20
CROWD = 20
#: The first ones load code, in the guest and here.
UNCOUNTED = 4

took_ms: defaultdict[str, list[float]] = defaultdict(list)


@contextmanager
def timed(name):
    began = time.monotonic()
    yield
    took_ms[name].append((time.monotonic() - began) * 1000)


def measure_create():
    # The first create makes what is missing.
    Sandbox.create().kill()
    for _ in range(RUNS):
        with timed("create to exit of true"):
            with timed("create"):
                sandbox = Sandbox.create()
            sandbox.commands.run("true")
        sandbox.kill()


def measure_commands(sandbox):
    for _ in range(UNCOUNTED):
        sandbox.commands.run("true")
    for _ in range(2 * RUNS):
        with timed("exec of true"):
            sandbox.commands.run("true")


def measure_files(sandbox):
    content = os.urandom(1 << 20) * (SIZE >> 20)
    for _ in range(max(3, RUNS // 4)):
        with timed("write of 64 MB"):
            sandbox.files.write("file", content)
        with timed("read of 64 MB"):
            back = sandbox.files.read("file", format="bytes")
        if back != content:
            raise RuntimeError(f"{len(back)} other bytes were read")


async def measure_crowd():
    """All must succeed."""
    for _ in range(max(1, RUNS // 5)):
        with timed(f"{CROWD} creates at once"):
            made = await asyncio.gather(*(AsyncSandbox.create() for _ in range(CROWD)))
        await asyncio.gather(*(each.kill() for each in made))


def main():
    measure_create()
    with Sandbox.create() as sandbox:
        measure_commands(sandbox)
        measure_files(sandbox)
    asyncio.run(measure_crowd())
    json.dump(took_ms, sys.stdout)


main()
