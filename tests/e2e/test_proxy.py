"""The ports of a real sandbox through `sandmartin up`, by curl, websockets and raw sockets."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import websockets

from sandmartin.control.certificates import Certificates
from tests.control.inside import connected, request
from tests.e2e.conftest import Place
from tests.e2e.test_up import Up, clear, up

OPEN, HIDDEN, SOCKET, LOAD = 8000, 8001, 8002, 8003
_DEADLINE_S = 60.0
#: Takes whatever is sent, and sends as much as the path asks for; and echoes WebSocket frames.
_SERVER = r"""
import base64, hashlib, socketserver, sys

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.rfile.readline()
        lines = head.decode().split("\r\n")
        fields = dict(l.lower().split(": ", 1) for l in lines[1:] if l)
        if "sec-websocket-key" in fields:
            key = next(l.split(": ")[1] for l in lines if l.lower().startswith("sec-websocket-key"))
            self.socket(key)
            return
        left = int(fields.get("content-length", 0))
        digest = hashlib.sha256()
        while left:
            data = self.rfile.read(min(left, 1 << 18))
            digest.update(data)
            left -= len(data)
        size = int(lines[0].split()[1].strip("/") or 0)
        said = digest.hexdigest().encode() if not size else b""
        length = size or len(said)
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + said)
        for _ in range(size >> 18):
            self.wfile.write(bytes(range(256)) * 1024)

    def socket(self, key):
        accept = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        accept = base64.b64encode(accept).decode()
        self.wfile.write(("HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n").encode())
        while True:
            first, second = self.rfile.read(2)
            size = second & 127
            if size == 126:
                size = int.from_bytes(self.rfile.read(2), "big")
            mask = self.rfile.read(4)
            data = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(size)))
            length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
            self.wfile.write(bytes([first]) + length + data)
            if first & 15 == 8:
                return

class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True

Server(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
"""


@dataclass
class Site:
    """A served platform and one sandbox in which servers run."""

    up: Up
    sandbox_id: str
    access: dict[str, str]

    @property
    def port(self) -> int:
        return int(self.up.url.rpartition(":")[2])

    def name(self, port: int) -> str:
        return f"{port}-{self.sandbox_id}.sandboxes.test"

    def curl(self, port: int, path: str, *words: str) -> tuple[int, bytes]:
        name = self.name(port)
        command = ["curl", "-sS", "-m", "120", "--resolve", f"{name}:{self.port}:127.0.0.1", *words]
        command += ["-w", "\n%{http_code}", f"http://{name}:{self.port}{path}"]
        done = subprocess.run(command, capture_output=True, check=True, timeout=150)
        body, _, status = done.stdout.rpartition(b"\n")
        return int(status), body

    def until_open(self, port: int) -> None:
        until = time.monotonic() + _DEADLINE_S
        while (answer := self.curl(port, "/"))[0] != 200:
            assert answer[0] == 502 and b"port is not open" in answer[1], answer
            assert time.monotonic() < until


@contextmanager
def _site(one: Up) -> Iterator[Site]:
    path = one.create(auto_resume=True)
    site = Site(one, path.rpartition("/")[2], one.ask("GET", f"{path}/access"))
    script = "mkdir -p /srv/www; echo hello > /srv/www/index.html; cd /srv/www; "
    for port, address in ((OPEN, "0.0.0.0"), (HIDDEN, "127.0.0.1")):
        script += f"nohup python3 -m http.server --bind {address} {port} >/dev/null 2>&1 & "
    script += f"cat > /srv/server.py <<'E'\n{_SERVER}\nE\n"
    script += f"nohup python3 /srv/server.py {LOAD} >/dev/null 2>&1 &"
    one.sh(path, script)
    for port in (OPEN, HIDDEN, LOAD):
        site.until_open(port)
    yield site
    one.curl("DELETE", path, expect=204)


def test_the_ports_of_a_sandbox(place: Place, tmp_path: Path) -> None:
    with up(place, "data") as one:
        with _site(one) as site:
            _check_ports(site)
            _check_load(site, tmp_path)
            asyncio.run(_check_socket(site))
            _check_guest(site)
            asyncio.run(_check_smuggling(site))
            asyncio.run(_check_slow_client(site))
            _check_sleep(site)
            _check_private(one)
        assert site.curl(OPEN, "/")[0] == 502
        assert b"was not found" in site.curl(OPEN, "/")[1]
    clear(place, "data")


def _check_ports(site: Site) -> None:
    for port in (OPEN, HIDDEN):
        assert site.curl(port, "/index.html") == (200, b"hello\n")
        assert site.curl(port, "/none")[0] == 404
        assert site.curl(port, "/", "-I")[0] == 200
    status, body = site.curl(SOCKET, "/")
    assert status == 502 and json.loads(body)["message"].endswith("port is not open")


def _check_load(site: Site, tmp_path: Path) -> None:
    file, size = tmp_path / "load", 64 << 20
    file.write_bytes(bytes(range(256)) * (size >> 8))
    expected = hashlib.sha256(file.read_bytes()).hexdigest().encode()
    begun = time.monotonic()
    assert site.curl(LOAD, "/0", "-T", str(file)) == (200, expected)
    sent = time.monotonic()
    assert site.curl(LOAD, f"/{size}", "-o", str(tmp_path / "back"))[0] == 200
    back = time.monotonic()
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    print(f"64 MB: up {64 / (sent - begun):.0f} MB/s, down {64 / (back - sent):.0f} MB/s")


async def _check_socket(site: Site) -> None:
    url = f"ws://{site.name(LOAD)}/"
    async with websockets.connect(url, host="127.0.0.1", port=site.port, proxy=None) as socket:
        for size in (1, 125, 5000):
            await socket.send(b"x" * size)
            assert await asyncio.wait_for(socket.recv(), _DEADLINE_S) == b"x" * size


def _check_guest(site: Site) -> None:
    """The guest agent's port: its token, its control routes, its user."""
    guest, token = 49983, f"X-Access-Token: {site.access['access_token']}"
    assert site.curl(guest, "/health")[0] == 204
    listing = ("-H", "Content-Type: application/json", "-d", "{}")
    assert site.curl(guest, "/process.Process/List", *listing)[0] == 401
    assert site.curl(guest, "/process.Process/List", "-H", token, *listing)[0] == 200
    for route in ("/init", "/%69nit", "//init", "/./init", "/x/../init", "/tunnel?port=22"):
        words = ("--path-as-is", "-H", token, "-d", "{}")
        assert site.curl(guest, route, *words)[0] == 404, route
    # E2B's default user, where nobody is named.
    content = ("-H", "Content-Type: application/octet-stream", "--data-binary", "hi")
    written = site.curl(guest, "/files?path=a.txt", "-H", token, *content)
    assert written[0] == 200, written
    assert json.loads(written[1])[0]["path"] == "/home/user/a.txt"
    owner = site.up.sh(f"/sandboxes/{site.sandbox_id}", "stat -c %U /home/user/a.txt")
    assert owner == "user\n"


async def _check_smuggling(site: Site) -> None:
    name = site.name(OPEN)
    behind = b"0\r\n\r\nGET /none HTTP/1.1\r\nHost: x\r\n\r\n"
    for headers in (
        ("Content-Length: 4", "Transfer-Encoding: chunked"),
        ("Content-Length: 4", "Content-Length: 50"),
        ("Transfer-Encoding: chunked, gzip",),
    ):
        async with connected(site.port, request("POST", "/", name, *headers) + behind) as raw:
            assert (await raw.answer())[0] in {400, 501}
            await raw.rest()
    folded = request("GET", "/index.html", name, "X: a\r\n Host: other")
    async with connected(site.port, folded) as raw:
        assert (await raw.answer())[::2] == (200, b"hello\n")
    async with connected(site.port, request("GET", f"http://{name}/index.html", name)) as raw:
        assert (await raw.answer())[::2] == (200, b"hello\n")
    async with connected(site.port, request("GET", "http://other/index.html", name)) as raw:
        assert (await raw.answer())[0] == 400
    guest = f"49983-{site.sandbox_id}.x"
    async with connected(site.port, request("POST", f"http://{guest}/init", guest)) as raw:
        assert (await raw.answer())[0] == 404


async def _check_slow_client(site: Site) -> None:
    """Who reads slowly costs nobody memory, and keeps nobody else waiting."""
    rss = _rss_mb(site)
    wanted = request("GET", f"/{256 << 20}", site.name(LOAD))
    async with connected(site.port, wanted) as raw:
        await raw.reader.readuntil(b"\r\n\r\n")
        for _ in range(5):
            await raw.reader.readexactly(1 << 16)
            assert (await asyncio.to_thread(site.curl, OPEN, "/index.html"))[0] == 200
        assert _rss_mb(site) - rss < 64


def _rss_mb(site: Site) -> int:
    status = Path(f"/proc/{site.up.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if "VmRSS" in line).split()[1]) >> 10


def _check_sleep(site: Site) -> None:
    path = f"/sandboxes/{site.sandbox_id}"
    assert site.up.ask("POST", f"{path}/pause")["status"] == "paused"
    assert site.curl(HIDDEN, "/index.html") == (200, b"hello\n")
    assert site.up.state(path) == "running"


def _check_private(one: Up) -> None:
    path = one.create(public_traffic=False)
    site = Site(one, path.rpartition("/")[2], one.ask("GET", f"{path}/access"))
    assert site.curl(OPEN, "/")[0] == 403
    token = f"E2b-Traffic-Access-Token: {site.access['traffic_token']}"
    status, body = site.curl(OPEN, "/", "-H", token)
    assert status == 502 and b"port is not open" in body
    one.ask("POST", f"{path}/pause")
    assert site.curl(OPEN, "/", "-H", token)[0] == 502
    assert one.state(path) == "paused"
    one.curl("DELETE", path, expect=204)


@pytest.mark.parametrize("name", ["bank"])
def test_names_and_tls(place: Place, tmp_path: Path, name: str) -> None:
    files = {each: str(file) for each, file in Certificates.make(name).write(tmp_path).items()}
    tls = ("--domain", f"{name}.localhost", "--tls-cert", files["cert"], "--tls-key", files["key"])
    with up(place, "data", *tls) as one:
        assert one.url.startswith("https://127.0.0.1:")
        port = one.url.rpartition(":")[2]
        for host, expected in (
            (f"api.{name}.localhost", b"200"),
            (f"8000-sb{'0' * 20}.{name}.localhost", b"502"),
        ):
            resolved = ["--resolve", f"{host}:{port}:127.0.0.1", "--cacert", files["issuer"]]
            command = ["curl", "-sS", *resolved, "-o", "/dev/null", "-w", "%{http_code}"]
            done = subprocess.run(
                [*command, f"https://{host}:{port}/healthz"],
                capture_output=True,
                check=True,
                timeout=60,
            )
            assert done.stdout == expected
    clear(place, "data")
