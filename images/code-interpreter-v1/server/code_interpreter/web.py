"""The protocol over HTTP: executions as lines of JSON, each sent when it comes; contexts."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.web import Application, HTTPError, RequestHandler

from code_interpreter import items
from code_interpreter.contexts import Contexts, UnknownContext, Unusable
from code_interpreter.items import Item
from code_interpreter.kernel import KernelDied
from code_interpreter.languages import UnknownLanguage
from code_interpreter.surroundings import Sandbox

_KEEPALIVE_S = 5.0
_STATUS = {UnknownContext: 404, UnknownLanguage: 400, Unusable: 400, KernelDied: 500}


class Refused(HTTPError):
    """What cannot be done as it is asked for; `text` is the answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status)
        self.text = text


class Handler(RequestHandler):
    """What all requests have in common: JSON bodies, and errors as one sentence of text."""

    def initialize(self, contexts: Contexts, sandbox: Sandbox) -> None:
        self.contexts = contexts
        self.sandbox = sandbox

    def body(self) -> dict[str, Any]:
        """The JSON object of the request. Raises Refused."""
        try:
            parsed = json.loads(self.request.body or b"{}")
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise Refused(400, "the body is not a JSON object")
        return parsed

    def text(self, body: dict[str, Any], name: str) -> str:
        """A field that is a text or absent. Raises Refused."""
        value = body.get(name) or ""
        if not isinstance(value, str) or "\0" in value:
            raise Refused(400, f"{name} is not a text")
        return value

    def write_json(self, content: object) -> None:
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(content))

    def write_error(self, status_code: int, **kwargs: Any) -> None:  # noqa: ARG002
        _, error, _ = kwargs.get("exc_info", (None, None, None))
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(error.text if isinstance(error, Refused) else self._reason)

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Only what is our own fault; what was refused is told to who asked."""
        if not isinstance(value, Refused):
            super().log_exception(typ, value, tb)

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Turn our errors into answers."""
        try:
            yield
        except tuple(_STATUS) as error:
            raise Refused(_STATUS[type(error)], str(error)) from error


class Health(Handler):
    async def get(self) -> None:
        self.write("OK")


class Execute(Handler):
    """`POST /execute`: a line of JSON for each thing that code gives."""

    async def post(self) -> None:
        body = self.body()
        code, context_id = self.text(body, "code"), self.text(body, "context_id")
        language, envs = self.text(body, "language"), _envs(body)
        if context_id and language:
            raise Refused(400, "only one of context_id and language can be given")
        with self.translated():
            if context_id:
                context = self.contexts.get(context_id)
            else:
                context = self.contexts.default(language or "python")
        here = await self.sandbox.look(self.request.headers.get("X-Access-Token", ""))
        self.set_header("Content-Type", "application/x-ndjson")
        self._sending = asyncio.ensure_future(self._send(context.execute(code, envs, here)))
        with contextlib.suppress(asyncio.CancelledError):
            await self._sending

    async def _send(self, found: AsyncGenerator[Item, None]) -> None:
        with contextlib.suppress(StreamClosedError):
            async with contextlib.aclosing(_kept_alive(found)) as lines:
                async for item in lines:
                    self.write(json.dumps(item) + "\n")
                    await self.flush()

    def on_connection_close(self) -> None:
        """Nobody listens any more: what runs is interrupted."""
        if hasattr(self, "_sending"):
            self._sending.cancel()


async def _kept_alive(found: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    """The same items, and between those that are long in coming a sign of life."""
    async with contextlib.aclosing(found):
        coming = asyncio.ensure_future(anext(found))
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=_KEEPALIVE_S)
                if not done:
                    yield items.KEEPALIVE
                    continue
                try:
                    yield coming.result()
                except StopAsyncIteration:
                    return
                coming = asyncio.ensure_future(anext(found))
        finally:
            coming.cancel()
            await asyncio.wait({coming})


def _envs(body: dict[str, Any]) -> dict[str, str]:
    """Variables for one execution. Raises Refused."""
    envs = body.get("env_vars") or {}
    if not isinstance(envs, dict):
        raise Refused(400, "env_vars is not an object")
    for name, value in envs.items():
        if not name or "=" in name or not isinstance(value, str) or "\0" in name + value:
            raise Refused(400, "env_vars has a name or a value that no environment can have")
    return envs


class ContextList(Handler):
    async def get(self) -> None:
        self.write_json([context.describe() for context in self.contexts.all()])

    async def post(self) -> None:
        body = self.body()
        called, cwd = self.text(body, "language") or "python", self.text(body, "cwd")
        with self.translated():
            context = await self.contexts.create(called, cwd)
        self.write_json(context.describe())


class OneContext(Handler):
    async def get(self, context_id: str) -> None:
        with self.translated():
            self.write_json(self.contexts.get(context_id).describe())

    async def delete(self, context_id: str) -> None:
        with self.translated():
            await self.contexts.remove(context_id)
        self.set_status(204)


class Restart(Handler):
    async def post(self, context_id: str) -> None:
        with self.translated():
            await self.contexts.get(context_id).restart()
        self.set_status(204)


def application(contexts: Contexts, sandbox: Sandbox) -> Application:
    """All routes."""
    with_both = {"contexts": contexts, "sandbox": sandbox}
    routes: list[tuple[str, type[Handler]]] = [
        (r"/health", Health),
        (r"/execute", Execute),
        (r"/contexts", ContextList),
        (r"/contexts/([^/]+)", OneContext),
        (r"/contexts/([^/]+)/restart", Restart),
    ]
    # A line for each request is nobody's to read here.
    return Application(
        [(path, handler, with_both) for path, handler in routes], log_function=lambda _: None
    )
