"""A thousand connections over TLS on which nothing passes, and one of them for ten minutes.

With the clock's own minutes: what ends an idle stream (a server's timer, a proxy's, a kernel's)
would show only then.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import ssl
import time
from pathlib import Path

import pytest

from sandmartin.control.certificates import Certificates
from tests.control.inside import Raw, request
from tests.e2e.conftest import Place
from tests.e2e.test_up import Up, clear, up

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

_COUNT, _AT_ONCE = 1000, 50
_IDLE_S = 600.0
_MAX_KB_EACH = 200
_PORT = 8000
_DEADLINE_S = 60.0
#: Sends an event to each that connects, and one more to all once `/go` is asked for.
_SERVER = r"""
import asyncio

go = asyncio.Event()

async def serve(reader, writer):
    head = await reader.readuntil(b"\r\n\r\n")
    if head.startswith(b"GET /go"):
        go.set()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    else:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await go.wait()
        writer.write(b"data: 2\n\n")
    writer.close()

async def main():
    server = await asyncio.start_server(serve, "0.0.0.0", 8000, backlog=1024)
    await server.serve_forever()

asyncio.run(main())
"""


class Site:
    """A sandbox that is reached by its name over TLS."""

    def __init__(self, one: Up, issuer: Path, sandbox_id: str) -> None:
        self._port = int(one.url.rpartition(":")[2])
        self._name = f"{_PORT}-{sandbox_id}.bank.localhost"
        self._tls = ssl.create_default_context(cafile=os.fspath(issuer))

    async def ask(self, path: str) -> Raw:
        """A connection on which a request was sent."""
        async with asyncio.timeout(_DEADLINE_S):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", self._port, ssl=self._tls, server_hostname=self._name
            )
            writer.write(request("GET", path, f"{self._name}:{self._port}"))
            return Raw(reader, writer)

    async def stream(self) -> Raw:
        """One that has had its first event."""
        raw = await self.ask("/")
        await asyncio.wait_for(raw.reader.readuntil(b"data: 1\n\n"), _DEADLINE_S)
        return raw

    async def until_open(self) -> None:
        async with asyncio.timeout(_DEADLINE_S):
            while True:
                raw = await self.ask("/")
                head = await raw.reader.readuntil(b"\r\n\r\n")
                raw.writer.transport.abort()
                if b" 200 " in head.partition(b"\r\n")[0]:
                    return
                await asyncio.sleep(0.2)


def _pss_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise AssertionError("no Pss")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _create(one: Up) -> str:
    words = ("-k", "-H", "Content-Type: application/json", "-d")
    made = one.curl("POST", "/sandboxes", *words, '{"memory_mb": 512}', expect=201)
    sandbox_id = str(json.loads(made)["id"])
    script = f"cat >/srv/s.py <<'E'\n{_SERVER}\nE\n"
    script += "ulimit -n 8192; nohup python3 /srv/s.py >/dev/null 2>&1 &"
    command = json.dumps({"cmd": "sh", "args": ["-c", script]})
    one.curl("POST", f"/sandboxes/{sandbox_id}/exec", *words, command)
    return sandbox_id


async def _hold(site: Site, pid: int) -> None:
    await site.until_open()
    streams = [await site.stream() for _ in range(_AT_ONCE)]
    before_kb = _pss_kb(pid)
    for _ in range(_COUNT // _AT_ONCE):
        streams += await asyncio.gather(*(site.stream() for _ in range(_AT_ONCE)))
    each_kb = (_pss_kb(pid) - before_kb) / _COUNT
    began, used_s = time.monotonic(), _cpu_s(pid)
    await asyncio.sleep(_IDLE_S)  # ten real minutes, which are what is shown
    share = (_cpu_s(pid) - used_s) / (time.monotonic() - began)
    print(
        f"{_COUNT} idle connections over TLS: {each_kb:.0f} kB each, {100 * share:.1f} % of a core"
    )
    go = await site.ask("/go")
    assert b"200" in await asyncio.wait_for(go.reader.readline(), _DEADLINE_S)
    go.writer.transport.abort()
    async with asyncio.timeout(_DEADLINE_S):
        await asyncio.gather(*(s.reader.readuntil(b"data: 2\n\n") for s in streams))
    for stream in streams:
        stream.writer.transport.abort()
    assert each_kb < _MAX_KB_EACH and share < 0.2


def test_a_thousand_idle_streams_live_for_ten_minutes(place: Place, tmp_path: Path) -> None:
    files = Certificates.make("bank").write(tmp_path)
    tls = ("--tls-cert", str(files["cert"]), "--tls-key", str(files["key"]))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    with up(place, "data", "--domain", "bank.localhost", "--on-exit", "kill", *tls) as one:
        site = Site(one, files["issuer"], _create(one))
        asyncio.run(_hold(site, one.process.pid))
    clear(place, "data")
