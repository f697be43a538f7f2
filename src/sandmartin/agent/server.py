"""The agent's door: the Connect protocol on its socket, and the process that serves it.

Errors of ours leave with their code and hint as a detail; anything else is a bug, logged once and
sent out without detail.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import os
import re
import resource
import signal
import socket
import ssl
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import uvicorn
from connectrpc.code import Code
from connectrpc.codec import proto_binary_codec, proto_json_codec
from connectrpc.errors import ConnectError
from connectrpc.request import RequestContext

from sandmartin import errors
from sandmartin.agent.host import Host
from sandmartin.agent.machine import Machine, open_machine
from sandmartin.agent.membership import HEARTBEAT_S, NO_WISH, Member, Wish, forget, plan
from sandmartin.agent.proxy import Proxy, is_proxied
from sandmartin.agent.service import MAX_MESSAGE_BYTES, HostAgent
from sandmartin.errors import Invalid, SandmartinError
from sandmartin.model import Settings
from sandmartin.relay.buffers import keep_tls_small
from sandmartin.relay.server import App, Message, Receive, Scope, Send, protocol_for
from sandmartin.rpc.hostagent.v1 import hostagent_pb as pb
from sandmartin.rpc.hostagent.v1.hostagent_connect import (
    HostAgentServiceASGIApplication,
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_Req = TypeVar("_Req")
_Res = TypeVar("_Res")
_Context = RequestContext[Any, Any]

CODES: dict[str, Code] = {
    errors.SandmartinError.code: Code.INTERNAL,
    errors.Invalid.code: Code.INVALID_ARGUMENT,
    errors.Unauthenticated.code: Code.UNAUTHENTICATED,
    errors.Denied.code: Code.PERMISSION_DENIED,
    errors.NotFound.code: Code.NOT_FOUND,
    errors.Conflict.code: Code.FAILED_PRECONDITION,
    errors.AlreadyExists.code: Code.ALREADY_EXISTS,
    errors.NotStarted.code: Code.FAILED_PRECONDITION,
    errors.Exhausted.code: Code.RESOURCE_EXHAUSTED,
    errors.DiskFull.code: Code.RESOURCE_EXHAUSTED,
    errors.Unavailable.code: Code.UNAVAILABLE,
    errors.GuestSilent.code: Code.UNAVAILABLE,
    errors.TimedOut.code: Code.DEADLINE_EXCEEDED,
    errors.Unimplemented.code: Code.UNIMPLEMENTED,
    errors.ToolFailed.code: Code.INTERNAL,
}

_SHUTDOWN_GRACE_S = 10
_HANDSHAKE_S = 10.0
_FAREWELL_S = 0.5
_SWEEP_S = 0.2
#: Levels of nested JSON; our messages have four.
_MAX_DEPTH = 64
#: What changes the depth of a JSON document, and what may hide it: strings and escapes in them.
_JSON_MARK = re.compile(rb'\\.|["\[\]{}]', re.DOTALL)


# Errors.


def to_connect_error(error: Exception) -> ConnectError:
    """What leaves the agent for `error`."""
    if isinstance(error, ConnectError):
        return _with_info(error)
    if isinstance(error, SandmartinError):
        detail = pb.ErrorInfo(code=error.code, hint=error.hint)
        return ConnectError(CODES[error.code], error.message, [detail])
    _log.error("internal error", exc_info=error)
    return _with_info(ConnectError(Code.INTERNAL, "internal error; the agent's log says more"))


def _with_info(error: ConnectError) -> ConnectError:
    """The library's own error, which says what was wrong with a request, in our form."""
    code = next((code for code, wire in CODES.items() if wire is error.code), None)
    if code is None or error.details:
        return error
    return ConnectError(error.code, error.message, [pb.ErrorInfo(code=code)])


@contextlib.asynccontextmanager
async def _closing(messages: AsyncIterator[_Res]) -> AsyncIterator[AsyncIterator[_Res]]:
    """A handler's messages; it is closed at once, not whenever memory is collected."""
    try:
        yield messages
    finally:
        if isinstance(messages, AsyncGenerator):
            await messages.aclose()


class ErrorInterceptor:
    """Turns our errors into the wire's at the one edge where calls come in."""

    async def intercept_unary(
        self,
        call_next: Callable[[_Req, _Context], Awaitable[_Res]],
        request: _Req,
        ctx: _Context,
    ) -> _Res:
        try:
            return await call_next(request, ctx)
        except Exception as error:
            raise to_connect_error(error) from error

    async def intercept_client_stream(
        self,
        call_next: Callable[[AsyncIterator[_Req], _Context], Awaitable[_Res]],
        request: AsyncIterator[_Req],
        ctx: _Context,
    ) -> _Res:
        try:
            return await call_next(request, ctx)
        except Exception as error:
            raise to_connect_error(error) from error

    async def intercept_server_stream(
        self,
        call_next: Callable[[_Req, _Context], AsyncIterator[_Res]],
        request: _Req,
        ctx: _Context,
    ) -> AsyncIterator[_Res]:
        try:
            async with _closing(call_next(request, ctx)) as messages:
                async for message in messages:
                    yield message
        except Exception as error:
            raise to_connect_error(error) from error


# Requests.


class ShallowJson:
    """The JSON codec, for messages as deep as ours can be.

    The library's parser recurses without a limit, and a document that is deep enough ends the
    whole process.
    """

    def __init__(self) -> None:
        self._codec = proto_json_codec()

    def name(self) -> str:
        return self._codec.name()

    def encode(self, message: Any) -> bytes:
        return self._codec.encode(message)

    def decode(self, data: bytes | bytearray, message_class: type[Any]) -> Any:
        # Counting is quick even where there is much; looking closer is for the rare rest.
        if data.count(b"[") + data.count(b"{") > _MAX_DEPTH and _depth_exceeds(data, _MAX_DEPTH):
            raise ConnectError(
                Code.INVALID_ARGUMENT, f"the JSON is nested deeper than {_MAX_DEPTH} levels"
            )
        return self._codec.decode(data, message_class)


def _depth_exceeds(document: bytes | bytearray, limit: int) -> bool:
    depth, in_string = 0, False
    for match in _JSON_MARK.finditer(document):
        mark = match[0]
        if mark == b'"':
            in_string = not in_string
        elif not in_string and mark in b"[{":
            depth += 1
        elif not in_string and mark in b"]}":
            depth -= 1
        if depth > limit:
            return True
    return False


class EarlyAnswers:
    """ASGI: who is answered before the whole request is read is sent no further: it ends there.

    Many clients look at the answer only once they have sent all, or can send no more.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole = False

        async def receive_and_see() -> Message:
            nonlocal whole
            event = await receive()
            whole = whole or not event.get("more_body", False)
            return event

        async def send_and_end(event: Message) -> None:
            if event["type"] == "http.response.start" and not whole:
                # uvicorn closes the connection then, once all of the answer is sent.
                event = {**event, "headers": [*event.get("headers", ()), (b"connection", b"close")]}
            await send(event)

        await self._app(scope, receive_and_see, send_and_end)


def application(host: Host) -> App:
    """The ASGI application of the agent."""
    service: Any = HostAgentServiceASGIApplication(
        HostAgent(host),
        interceptors=[ErrorInterceptor()],
        read_max_bytes=MAX_MESSAGE_BYTES,
        codecs=[proto_binary_codec(), ShallowJson()],
    )
    return Proxy(host, EarlyAnswers(service))


# The process.


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: the agent decides what a signal means."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _TlsServer(_Server):
    """As `_Server`, with a context of ours and patience for peers that say nothing."""

    def __init__(self, config: uvicorn.Config, tls: ssl.SSLContext) -> None:
        super().__init__(config)
        self._tls = tls
        keep_tls_small()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])

        def make_protocol() -> asyncio.Protocol:
            protocol: Any = self.config.http_protocol_class
            made: asyncio.Protocol = protocol(
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
            )
            return made

        for listener in sockets or ():
            server = await asyncio.get_running_loop().create_server(
                make_protocol,
                sock=listener,
                ssl=self._tls,
                ssl_handshake_timeout=_HANDSHAKE_S,
                # One that is idle does not answer our farewell: by default for 30 s.
                ssl_shutdown_timeout=_FAREWELL_S,
            )
            self.servers.append(server)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        sweep = asyncio.create_task(self._sweep(), name="farewells")
        try:
            await super().shutdown(sockets)
        finally:
            sweep.cancel()

    async def _sweep(self) -> None:
        """Bid farewell also to who was still shaking hands when all others were."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            for connection in list(self.server_state.connections):
                connection.shutdown()


def bind_socket(settings: Settings) -> socket.socket:
    """The agent's listening unix socket, for root and the group alone.

    The data directory is locked, so a socket file that is already there is stale.
    """
    path = settings.socket
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The mode must be right from the first moment on: there is no window to connect through.
    umask = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
    except OSError as error:
        listener.close()
        raise Invalid(
            f"the socket {path} cannot be made: {error}", hint="use a shorter --data-dir"
        ) from error
    finally:
        os.umask(umask)
    with contextlib.suppress(KeyError, PermissionError):
        os.chown(path, -1, grp.getgrnam(settings.group).gr_gid)
        path.chmod(0o660)
    listener.listen(128)
    return listener


def bind_tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises Invalid."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Invalid(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            hint="choose another --listen; port 0 takes a free one",
        ) from error
    listener.listen(128)
    return listener


async def serve(
    settings: Settings,
    *,
    until_stdin_closes: bool = False,
    announce: Callable[[dict[str, Any]], None] = lambda _: None,
    leave: asyncio.Event | None = None,
    wish: Wish = NO_WISH,
) -> None:
    """Run the agent until SIGTERM or SIGINT (VMs run on), Terminate, or the end of stdin.

    `announce` is called once requests are served. With `until_stdin_closes` the end of stdin
    destroys every sandbox, as Terminate does. With `leave` that ends it instead of a signal.
    As a host of a platform it also listens on TCP, as `wish` has it or as it did before.
    """
    _forget_proxies()
    _raise_descriptor_limit()
    async with open_machine(settings) as machine:
        await serve_machine(
            machine,
            until_stdin_closes=until_stdin_closes,
            announce=announce,
            leave=leave,
            wish=wish,
        )


async def serve_machine(
    machine: Machine,
    *,
    until_stdin_closes: bool = False,
    announce: Callable[[dict[str, Any]], None] = lambda _: None,
    leave: asyncio.Event | None = None,
    wish: Wish = NO_WISH,
    heartbeat_s: float = HEARTBEAT_S,
) -> None:
    """Serve the sandboxes of `machine`, as `serve` has it."""
    path = machine.settings.socket
    by_signal = leave is None
    leave, stdin_ended = leave or asyncio.Event(), asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        host = Host(machine)
        stack.push_async_callback(host.close)
        await host.open()
        listener = stack.enter_context(contextlib.closing(bind_socket(machine.settings)))
        stack.callback(path.unlink, missing_ok=True)
        if by_signal:
            stack.enter_context(_signals(leave.set))
        if until_stdin_closes:
            stack.enter_context(_stdin_watch(stdin_ended.set))
        app = application(host)
        servers = [await stack.enter_async_context(_serving(app, listener))]
        told: dict[str, Any] = {"socket": os.fspath(path), "pid": os.getpid()}
        if (planned := plan(machine.data.path, wish)) is not None:
            member = Member(
                machine.data.path, planned, lambda: asdict(host.describe()), heartbeat_s
            )
            servers += await stack.enter_async_context(_membership(member, app, wish.token))
            told["address"] = member.address
        if not any(server.done() for server in servers):
            announce(told)
        ends = (leave.wait(), stdin_ended.wait(), host.terminated.wait(), machine.tasks.failed())
        await _first_of(*servers, *ends)
        if stdin_ended.is_set():
            await host.terminate()
        if host.terminated.is_set():
            forget(machine.data.path)


@contextlib.asynccontextmanager
async def _membership(
    member: Member, app: App, token: str
) -> AsyncIterator[list[asyncio.Task[None]]]:
    """The agent is a host of a platform: it is served over TLS, and is heard of; both tasks."""
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(member.close)
        listener = stack.enter_context(contextlib.closing(bind_tcp(*member.listen)))
        await member.join(listener.getsockname()[1], token)
        serving = await stack.enter_async_context(_serving(app, listener, member.context))
        heard = asyncio.create_task(member.run(), name="membership")
        try:
            yield [serving, heard]
        finally:
            heard.cancel()
            await asyncio.wait({heard})


@contextlib.asynccontextmanager
async def _serving(
    app: Any, listener: socket.socket, tls: ssl.SSLContext | None = None
) -> AsyncIterator[asyncio.Task[None]]:
    """The server's task, for as long as requests are served."""
    config = _uvicorn_config(app)
    server = _Server(config) if tls is None else _TlsServer(config, tls)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="server")
    try:
        await _first_of(task, server.ready.wait())
        yield task
    finally:
        server.should_exit = True
        await task


def _uvicorn_config(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=protocol_for(is_proxied),
        ws="none",
        lifespan="off",
        access_log=False,
        # What comes from a guest has its own, or none.
        date_header=False,
        log_config=None,
        log_level="warning",
        timeout_keep_alive=620,
        timeout_graceful_shutdown=_SHUTDOWN_GRACE_S,
        server_header=False,
    )


async def _first_of(*waits: Awaitable[Any]) -> None:
    """Wait for the first of `waits` and raise what it raised; what was a task before goes on."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, wait in zip(tasks, waits, strict=True):
        if task is not wait:
            task.cancel()
    for task in done:
        task.result()


@contextlib.contextmanager
def _signals(on_signal: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `on_signal`."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _stdin_watch(on_end: Callable[[], None]) -> Iterator[None]:
    """Call `on_end` once when our standard input has been closed."""
    loop = asyncio.get_running_loop()
    fd = sys.stdin.fileno()

    def readable() -> None:
        if not os.read(fd, 4096):
            loop.remove_reader(fd)
            on_end()

    loop.add_reader(fd, readable)
    try:
        yield
    finally:
        loop.remove_reader(fd)


def _raise_descriptor_limit() -> None:
    # A sandbox takes about a dozen; the soft limit is for programs that use `select`.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _forget_proxies() -> None:
    # The HTTP client that talks to the guests would send their traffic to a proxy named here.
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        os.environ.pop(name, None)
        os.environ.pop(name.upper(), None)
