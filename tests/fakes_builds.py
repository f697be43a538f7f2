"""A control plane as far as builds of templates go: the real bodies, over a real connection.

What a build comes to is for a test to say; so are the moments at which the connection is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sandmartin.control.server import listen
from tests.fakes_localagent import QuietServer
from tests.waiting import until

KEY = "e2b_" + "0" * 40


@dataclass
class FakeBuild:
    """A build that does what a test says."""

    build_id: str
    asked: dict[str, Any]
    state: str = "building"
    error: dict[str, Any] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)

    def say(self, message: str, **more: Any) -> None:
        number = len(self.log) + 1
        fields = {"number": number, "time": 1.0, "level": "info", "message": message, "step": 0}
        self.log.append({**fields, "phase": "build", "elapsed_ms": 0, **more})

    def end(self, state: str = "ready", **error: Any) -> None:
        self.error = {"code": "invalid", "hint": "", "step": None, **error} if error else None
        self.state = state

    def body(self) -> dict[str, Any]:
        return {
            "id": self.build_id,
            "name": self.asked["name"],
            "tags": self.asked.get("tags", []),
            "state": self.state,
            "template_id": "t1" if self.state == "ready" else None,
            "error": self.error,
            "created_at": 1.0,
            "started_at": 2.0,
            "finished_at": 4.5 if self.state != "building" else None,
            "steps_total": 3,
            "steps_done": 3,
            "steps_cached": 1,
        }


class BuildServer:
    """Builds by their ids, and what was uploaded."""

    def __init__(self) -> None:
        self.url = ""
        self.uploads: dict[str, bytes] = {}
        self.builds: dict[str, FakeBuild] = {}
        self.tags: dict[str, str] = {}
        #: The error that the next build is refused with.
        self.refusal: dict[str, str] | None = None
        #: What is answered to so many requests for a build is lost.
        self.lost_answers = 0
        self.keys: dict[str, str] = {}
        #: Entries after which a log's stream is lost, each time.
        self.cut_after = 10**9
        self.streams = 0

    async def begun(self, count: int = 1) -> FakeBuild:
        """The newest, once so many were asked for."""
        await until(lambda: len(self.builds) >= count, "a build")
        return list(self.builds.values())[-1]

    def application(self) -> Starlette:
        routes = [
            Route("/v1/builds/contexts/{sha256}", self._has, methods=["HEAD"]),
            Route("/v1/builds/contexts/{sha256}", self._upload, methods=["PUT"]),
            Route("/v1/builds", self._create, methods=["POST"]),
            Route("/v1/builds", self._list, methods=["GET"]),
            Route("/v1/builds/{build}", self._get, methods=["GET"]),
            Route("/v1/builds/{build}/logs", self._logs, methods=["GET"]),
            Route("/v1/builds/{build}/cancel", self._cancel, methods=["POST"]),
            Route("/v1/templates/{name}/tags", self._tags, methods=["GET"]),
            Route("/v1/templates/{name}/tags/{tag}", self._assign, methods=["PUT"]),
            Route("/v1/templates/{name}/tags/{tag}", self._remove, methods=["DELETE"]),
        ]
        return Starlette(routes=routes)

    async def _has(self, request: Request) -> Response:
        return Response(status_code=200 if request.path_params["sha256"] in self.uploads else 404)

    async def _upload(self, request: Request) -> Response:
        content = await request.body()
        sha256 = request.path_params["sha256"]
        if hashlib.sha256(content).hexdigest() != sha256:
            return _error(400, "invalid", "the digest is another")
        self.uploads[sha256] = content
        return Response(status_code=204)

    async def _create(self, request: Request) -> Response:
        if self.refusal is not None:
            return _error(400, "invalid", **self.refusal)
        build_id = self.keys.setdefault(
            request.headers["idempotency-key"], f"b{len(self.builds) + 1}"
        )
        build = self.builds.setdefault(build_id, FakeBuild(build_id, await request.json()))
        if self.lost_answers:
            self.lost_answers -= 1
            return StreamingResponse(_broken(), 202)
        return JSONResponse(build.body(), 202)

    async def _list(self, request: Request) -> Response:
        items = [each.body() for each in reversed(self.builds.values())]
        return JSONResponse({"items": items, "next": ""})

    async def _get(self, request: Request) -> Response:
        build = self.builds.get(request.path_params["build"])
        if build is None:
            return _error(404, "not_found", "there is no such build")
        return JSONResponse(build.body())

    async def _cancel(self, request: Request) -> Response:
        build = self.builds[request.path_params["build"]]
        if build.state == "building":
            build.end("cancelled")
        return JSONResponse(build.body())

    async def _logs(self, request: Request) -> Response:
        build = self.builds.get(request.path_params["build"])
        if build is None:
            return _error(404, "not_found", "there is no such build")
        after = int(request.query_params["after"])
        if "text/event-stream" in request.headers["accept"]:
            self.streams += 1
            return StreamingResponse(self._live(build, after), media_type="text/event-stream")
        items = build.log[after : after + 2]
        return JSONResponse({"items": items, "next": after + len(items)})

    async def _live(self, build: FakeBuild, after: int) -> AsyncIterator[str]:
        sent = 0
        while True:
            for entry in build.log[after:]:
                if sent == self.cut_after:
                    raise ConnectionResetError
                yield f"event: line\ndata: {json.dumps(entry)}\n\n"
                after, sent = after + 1, sent + 1
            if build.state != "building" and after == len(build.log):
                yield f"event: end\ndata: {json.dumps(build.body())}\n\n"
                return
            await asyncio.sleep(0.01)

    async def _tags(self, request: Request) -> Response:
        items = [_tag(tag, target) for tag, target in sorted(self.tags.items())]
        return JSONResponse({"items": items})

    async def _assign(self, request: Request) -> Response:
        tag = request.path_params["tag"]
        self.tags[tag] = self.tags.get((await request.json())["source"], "t1")
        return JSONResponse(_tag(tag, self.tags[tag]))

    async def _remove(self, request: Request) -> Response:
        if self.tags.pop(request.path_params["tag"], None) is None:
            return _error(404, "not_found", "there is no such tag")
        return Response(status_code=204)


async def _broken() -> AsyncIterator[str]:
    yield "{"
    raise ConnectionResetError


def _tag(tag: str, template_id: str) -> dict[str, Any]:
    return {"tag": tag, "template_id": template_id, "created_at": 1.0}


def _error(status: int, code: str, message: str, hint: str = "") -> Response:
    return JSONResponse({"error": {"code": code, "message": message, "hint": hint}}, status)


@contextlib.asynccontextmanager
async def serving_builds() -> AsyncIterator[BuildServer]:
    """A server on a port of its own."""
    builds = BuildServer()
    config = uvicorn.Config(
        builds.application(),
        lifespan="off",
        log_config=None,
        ws="none",
        timeout_graceful_shutdown=1,
    )
    server = QuietServer(config)
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        builds.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield builds
        finally:
            server.should_exit = True
            await task
