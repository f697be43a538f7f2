"""What the product is compared with, measured in the same run: boot, full save, gVisor, raw TCP.

Each does no more than it must: a baseline that is slowed down flatters us.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from bench import budgets
from bench.agents import Agent, Bench
from bench.inside import MB, TRUE, dirty_memory, fresh, run
from sandmartin.agent.vmm.freezer import Freezer
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.transport import Command, Stdout

# Boot.


async def measure_boot(bench: Bench) -> None:
    async with bench.agent(warm=False) as agent:
        for _ in range(max(2, bench.runs // 6)):
            began = time.monotonic()
            async with fresh(agent.transport) as sandbox:
                await run(sandbox, TRUE)
                took_ms = (time.monotonic() - began) * 1000
            bench.figures.add(budgets.BOOT, took_ms)


# gVisor.

_NAMESPACES = ("pid", "network", "ipc", "uts", "mount")


async def measure_gvisor(bench: Bench) -> None:
    """gVisor running the same command on the host's own files; left out where there is none."""
    runsc = shutil.which("runsc")
    if runsc is None:
        return
    bundle = bench.directory / "bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "config.json").write_text(json.dumps(_oci_config()))
    command = [runsc, f"--root={bench.directory / 'runsc'}", "--platform=ptrace"]
    command += ["--network=none", "--ignore-cgroups", "run", f"--bundle={bundle}"]
    for number in range(max(3, bench.runs // 2) + 1):
        began = time.monotonic()
        # Blocking: nothing else of ours runs meanwhile, and a start by asyncio costs more.
        done = subprocess.run([*command, f"true{number}"], capture_output=True, check=False)  # noqa: ASYNC221
        if done.returncode:
            raise RuntimeError(f"runsc: {done.stderr[-500:]!r}")
        if number:
            bench.figures.add(budgets.GVISOR, (time.monotonic() - began) * 1000)


def _oci_config() -> dict[str, object]:
    return {
        "ociVersion": "1.0.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [TRUE],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
        },
        "root": {"path": "/", "readonly": True},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": kind} for kind in _NAMESPACES]},
    }


# Full save.


async def measure_full_save(bench: Bench, agent: Agent) -> None:
    """QEMU's own `migrate` of the same VM to a file, synced: the baseline of a pause.

    By default QEMU holds itself back, to spare a network: a file needs no such care, and who saves
    to one sets the limit off. Both are told, the default for comparison with what others publish.
    """
    async with fresh(agent.transport) as sandbox:
        await dirty_memory(sandbox)
        monitor = agent.data_dir / "sandboxes" / sandbox.sandbox_id / "vm" / "freezer"
        target = bench.directory / "full.save"
        with Freezer(monitor) as freezer:
            limit = freezer.execute("query-migrate-parameters")["max-bandwidth"]
            for _ in range(max(3, bench.runs // 4)):
                for name, rate in ((budgets.FULL_SAVE, 1 << 40), (budgets.SLOW_SAVE, limit)):
                    freezer.execute("migrate-set-parameters", {"max-bandwidth": rate})
                    took_s = await asyncio.to_thread(_full_save, freezer, target)
                    bench.figures.add(name, took_s * 1000)


def _full_save(freezer: Freezer, target: Path) -> float:
    with target.open("wb") as file:
        began = time.monotonic()
        freezer.execute("stop")
        freezer.execute("getfd", {"fdname": "full"}, fd=file.fileno())
        freezer.execute("migrate", {"uri": "fd:full"})
        while (state := freezer.execute("query-migrate").get("status")) != "completed":
            if state in {"failed", "cancelled"}:
                raise RuntimeError("QEMU did not save")
            time.sleep(0.002)
        os.fsync(file.fileno())
        took_s = time.monotonic() - began
        freezer.execute("cont")
    target.unlink()
    return took_s


# Raw TCP.

#: In the guest: take connections, and of each all bytes ("i") or send as many ("o").
_PEER = """
import socket, sys
megabytes, block = int(sys.argv[1]), bytearray(1 << 20)
with socket.create_server(("0.0.0.0", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        with connection:
            if connection.recv(1) == b"i":
                left = megabytes << 20
                while left:
                    left -= connection.recv_into(block, min(left, len(block)))
                connection.sendall(b"!")
            else:
                for _ in range(megabytes):
                    connection.sendall(block)
"""


async def measure_raw_tcp(bench: Bench, sandbox: AsyncSandbox, address: str, size_mb: int) -> None:
    """As many bytes over one plain TCP connection of the same sandbox, in and out."""
    command = Command(cmd="python3", args=("-c", _PEER, str(size_mb)), timeout_s=300)
    async with sandbox.exec(command) as execution:
        port = 0
        async for event in execution:
            if isinstance(event, Stdout):
                port = int(event.data)
                break
        for _ in range(max(3, bench.runs // 4)):
            for name, move in ((budgets.RAW_IN, _send), (budgets.RAW_OUT, _receive)):
                took_s = await asyncio.to_thread(move, address, port, size_mb)
                bench.figures.add(name, took_s * 1000)
        await execution.signal(9)


def _send(address: str, port: int, size_mb: int) -> float:
    block = os.urandom(MB)
    began = time.monotonic()
    with socket.create_connection((address, port), timeout=60) as connection:
        connection.sendall(b"i")
        for _ in range(size_mb):
            connection.sendall(block)
        if connection.recv(1) != b"!":
            raise RuntimeError("the guest did not take all bytes")
        return time.monotonic() - began


def _receive(address: str, port: int, size_mb: int) -> float:
    block, left = bytearray(MB), size_mb * MB
    began = time.monotonic()
    with socket.create_connection((address, port), timeout=60) as connection:
        connection.sendall(b"o")
        while left:
            if not (count := connection.recv_into(block)):
                raise RuntimeError("the guest did not send all bytes")
            left -= count
        return time.monotonic() - began
