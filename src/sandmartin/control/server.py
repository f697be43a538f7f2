"""One replica as a process: it listens, works, and stops gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn

from sandmartin.control.app import create_app
from sandmartin.control.platform import Platform
from sandmartin.control.proxy import api_hosts, is_traffic
from sandmartin.errors import Invalid
from sandmartin.relay.buffers import keep_tls_small
from sandmartin.relay.server import protocol_for

_GRACE_S = 10
_KEEP_ALIVE_S = 75
_BACKLOG = 1024
#: Of a WebSocket.
_MAX_MESSAGE_BYTES = 1 << 20


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: whoever runs us decides what a signal means."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises Invalid."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, connections send small pieces at once; else they wait 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise Invalid(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            hint="choose another --host or --port; port 0 takes a free one",
        ) from error
    return listener


@contextlib.asynccontextmanager
async def serving(platform: Platform, listener: socket.socket) -> AsyncIterator[asyncio.Task[None]]:
    """Requests are served, and what need not be asked for is done; the server's task."""
    settings = platform.settings
    keep_tls_small()
    hosts = api_hosts(settings)
    config = uvicorn.Config(
        create_app(platform),
        http=protocol_for(
            lambda scope: is_traffic(scope, hosts), settings.head_s, settings.stall_s
        ),
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
        lifespan="off",
        access_log=False,
        log_config=None,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S,
        server_header=False,
        ws_max_size=_MAX_MESSAGE_BYTES,
        # Output of a terminal comes in small pieces: compressing them costs more than it spares.
        ws_per_message_deflate=False,
    )
    try:
        config.load()
    except OSError as error:
        raise Invalid(
            f"the certificate cannot be used: {error}",
            hint="--tls-cert and --tls-key name a certificate with its chain, and its key, as PEM",
        ) from error
    server = _Server(config)
    async with platform.working():
        task = asyncio.create_task(server.serve(sockets=[listener]), name="server")
        try:
            ready = asyncio.ensure_future(server.ready.wait())
            await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            yield task
        finally:
            # Streams of events would go on until the grace is over.
            platform.events.close()
            server.should_exit = True
            await asyncio.wait({task})
