"""Who may not do what: every route of the application, asked by those who must be refused.

The routes come from the route table and the bodies from OpenAPI, so that a new route is tried too.
One that everybody may ask stands in `PUBLIC`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import RouteContext, iter_route_contexts
from sqlalchemy import Table, select
from starlette.routing import WebSocketRoute

from sandmartin.control.app import create_app
from sandmartin.control.caller import Role
from sandmartin.control.db import Base
from sandmartin.control.platform import Platform
from tests.control.conftest import Person, Team, add_member, logged_in, make_user, new_person
from tests.control.test_sandboxes import create

pytestmark = pytest.mark.one_database

#: What anybody may ask.
PUBLIC = {
    "GET /healthz",
    # Its token is in the body.
    "POST /v1/hosts/register",
    "GET /readyz",
    # From this machine alone, or with a token of its own.
    "GET /metrics",
    "GET /openapi.json",
    "GET /docs",
    "GET /docs/oauth2-redirect",
    "GET /redoc",
    "GET /v1/auth/settings",
    "POST /v1/auth/signup",
    "POST /v1/auth/login",
    "POST /v1/auth/oauth/{provider}",
    "GET /auth/oauth/{provider}",
    "GET /auth/oauth/{provider}/callback",
    # The dashboard, which shows nothing before somebody is logged in.
    "GET /",
    "GET /dashboard",
    "GET /dashboard/assets/{name}",
    "GET /dashboard/favicon.svg",
    "GET /dashboard/{path:path}",
}
#: What is asked with a token that no browser sends by itself.
BY_TOKEN = {
    "POST /v1/hosts/{host_id}/heartbeat",
    "POST /v1/hosts/{host_id}/renew",
    "PUT /templates/uploads/{ticket}",
}
REFUSED = {401, 403, 404}
#: What they make belongs to whoever asks; a name that another team has too is no other team's.
OF_ONES_OWN = {"PUT /v1/templates/{name}/content"}
#: What happens by itself, whoever asks for whatever.
_TICKING_TABLES = {"attempts", "leases", "team_samples", "usage_days", "metric_blocks"}
_TICKING = {
    "last_used_at",
    "last_active_at",
    "heartbeat_at",
    "reached_at",
    "disk_free_mb",
    "seen_event_id",
}
#: How long a stream may go on before it is taken to be one.
_STREAM_S = 0.5
_DEADLINE_S = 20.0


@dataclass(frozen=True)
class Route:
    """A method and a path of the application."""

    method: str
    path: str
    endpoint: object
    #: As OpenAPI has it; empty for what it does not.
    described: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def parameters(self) -> list[str]:
        return re.findall(r"{(\w+)(?::\w+)?}", self.path)


def routes_of(app: FastAPI) -> list[Route]:
    """All there are; of an alias, which OpenAPI leaves out, what it says of the other."""
    document = app.openapi()["paths"]
    contexts: list[RouteContext] = list(iter_route_contexts(app.routes))
    described = {}
    for context in contexts:
        for method in context.methods or ():
            found = document.get(context.path_format or "", {}).get(method.lower())
            if found is not None:
                described[context.endpoint, method] = found
    routes = []
    for context in contexts:
        assert context.path is not None, f"{context} is a kind of route that is not tried"
        if isinstance(context.original_route, WebSocketRoute):
            methods = {"WS"}
        else:
            assert context.methods, f"{context.path} is a kind of route that is not tried"
            methods = context.methods - {"HEAD"}
        for method in sorted(methods):
            more = described.get((context.endpoint, method), {})
            routes.append(Route(method, context.path, context.endpoint, more))
    return routes


# Requests.


@dataclass(frozen=True)
class Bodies:
    """Makes what a route wants, out of OpenAPI, with certain ids wherever one fits."""

    schemas: Mapping[str, Any]
    ids: Mapping[str, str]

    def value(self, schema: Mapping[str, Any]) -> Any:
        if "$ref" in schema:
            return self.value(self.schemas[schema["$ref"].rpartition("/")[2]])
        for several in ("anyOf", "oneOf", "allOf"):
            if several in schema:
                return self.value(schema[several][0])
        if "enum" in schema or "const" in schema:
            return schema.get("const", schema.get("enum", [None])[0])
        match schema.get("type"):
            case "object":
                return self.object(schema)
            case "array":
                return [self.value(schema["items"])] if schema.get("minItems") else []
            case "integer" | "number":
                return max(schema.get("minimum", 1), 1)
            case "boolean":
                return True
            case _:
                return "x" * max(schema.get("minLength", 1), 1)

    def object(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        made = {}
        for name, each in schema.get("properties", {}).items():
            if name in self.ids and name.endswith("_id"):
                made[name] = self.ids[name]
            elif name in schema.get("required", ()):
                made[name] = self.value(each)
        return made

    def request(self, route: Route, headers: Mapping[str, str]) -> httpx.Request:
        path = re.sub(r"{(\w+)(?::\w+)?}", lambda each: self.ids[each[1]], route.path)
        query = {
            each["name"]: self.value(each["schema"])
            for each in route.described.get("parameters", ())
            if each["in"] == "query" and (each.get("required") or each["name"] in self.ids)
        }
        url = f"http://control{path}"
        method = "GET" if route.method == "WS" else route.method
        return httpx.Request(method, url, params=query, headers=headers, **self.content(route))

    def content(self, route: Route) -> dict[str, Any]:
        kinds: Mapping[str, Any] = route.described.get("requestBody", {}).get("content", {})
        if "application/json" in kinds:
            return {"json": self.value(kinds["application/json"]["schema"])}
        if "multipart/form-data" in kinds:
            fields = self.value(kinds["multipart/form-data"]["schema"])
            parts = {name: (None, str(value)) for name, value in fields.items()}
            return {"files": parts}
        return {"content": b"x"} if kinds else {}


@dataclass
class Answer:
    status: int = 0
    body: bytes = b""
    #: Of a WebSocket: it was refused, or closed at once.
    closed: bool = False


async def ask(app: FastAPI, request: httpx.Request, *, websocket: bool = False) -> Answer:
    """What the application answers, or the beginning of it where it does not end."""
    answer = Answer()
    started, gone = asyncio.Event(), asyncio.Event()
    kind = "websocket" if websocket else "http"
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": request.read()}]
    if websocket:
        messages = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "{}"}]

    async def receive() -> MutableMapping[str, Any]:
        if messages:
            return messages.pop(0)
        await gone.wait()
        return {"type": f"{kind}.disconnect", "code": 1000}

    async def send(message: MutableMapping[str, Any]) -> None:
        match message["type"].rpartition(".")[2]:
            case "start":
                answer.status = message["status"]
                started.set()
            case "body":
                answer.body += message.get("body", b"")
            case "close":
                answer.closed = True

    scope = {
        "type": kind,
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "ws" if websocket else "http",
        "path": request.url.path,
        "raw_path": request.url.raw_path.partition(b"?")[0],
        "query_string": request.url.query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "client": ("127.0.0.1", 1),
        "server": ("control", 80),
        "subprotocols": [],
        "extensions": {"websocket.http.response": {}} if websocket else {},
    }
    task = asyncio.create_task(app(scope, receive, send))
    waiting = asyncio.ensure_future(started.wait())
    await asyncio.wait({task, waiting}, timeout=_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait({task}, timeout=_STREAM_S)
    gone.set()
    for each in (task, waiting):
        each.cancel()
    await asyncio.wait({task, waiting})
    return answer


# What there is to be kept from others.


@dataclass(frozen=True)
class Victim:
    """A team with one of everything, whose ids the others know."""

    team: Team
    owner: Person
    ids: dict[str, str]

    @property
    def secrets(self) -> set[str]:
        """What others must never be shown."""
        return {self.team.team_id, self.team.key, self.owner.email, self.ids["sandbox_id"]}


@pytest.fixture
async def victim(platform: Platform, team: Team) -> AsyncIterator[Victim]:
    made = await create(team)
    snapshot = {"sandbox_id": made["id"], "name": "mine", "live": True}
    assert (await team.http.post("/v1/snapshots", json=snapshot)).status_code == 201
    async with new_person(platform, team.team_id, Role.OWNER) as owner:
        ids = {
            "sandbox_id": made["id"],
            "team_id": team.team_id,
            "user_id": owner.user_id,
            "name": "mine",
        }
        for route in routes_of(create_app(platform)):
            for name in route.parameters:
                ids[name] = ids.get(name) or await a_row(platform, name, ids)
        yield Victim(team, owner, ids)


async def a_row(platform: Platform, column: str, ids: Mapping[str, str]) -> str:
    """The id of a new row of the team, for the name of a table's key; `1` for any other name."""
    for mapper in Base.registry.mappers:
        table = mapper.local_table
        assert isinstance(table, Table)
        if [each.name for each in table.primary_key] == [column] and "team_id" in table.c:
            async with platform.db.write() as session:
                values = {each.name: _some(each, ids) for each in table.c if _needed(each)}
                made = table.insert().values(values).returning(table.c[column])
                return str((await session.execute(made)).scalar_one())
    return "1"


def _needed(column: Any) -> bool:
    return column.name == "team_id" or not (column.nullable or column.autoincrement is True)


def _some(column: Any, ids: Mapping[str, str]) -> Any:
    if column.name in ids:
        return ids[column.name]
    some = {str: f"some-{column.name}", bytes: b"some", float: 9e9, int: 0, bool: False}
    return some.get(column.type.python_type, {})


async def kept(platform: Platform, victim: Victim) -> str:
    """All rows that have to do with the team, but for what changes by itself."""
    ours = set(victim.ids.values()) - {"1"}
    lines = []
    async with platform.db.read() as session:
        for table in Base.metadata.sorted_tables:
            if table.name in _TICKING_TABLES:
                continue
            for row in (await session.execute(select(table))).mappings():
                if row.get("action") == "template.downloaded":
                    continue  # to read is no change
                if ours & {value for value in row.values() if isinstance(value, str)}:
                    values = {key: row[key] for key in row if key not in _TICKING}
                    lines.append(f"{table.name} {values}")
    return "\n".join(sorted(lines))


async def try_all(
    platform: Platform, victim: Victim, headers: Any
) -> AsyncIterator[tuple[Route, bool, Answer]]:
    """Ask every route; whether the request names something of the team, and the answer."""
    app = create_app(platform)
    bodies = Bodies(app.openapi().get("components", {}).get("schemas", {}), victim.ids)
    ours = set(victim.ids.values()) - {"1"}
    routes = routes_of(app)
    assert len(routes) > 40
    for route in routes:
        async with headers() as sent:
            request = bodies.request(route, sent)
            said = f"{request.url.path}?{request.url.query.decode()} {request.read().decode()}"
            names = any(each in re.split(r'[/?&= "]', said) for each in ours)
            yield route, names, await ask(app, request, websocket=route.method == "WS")


def is_refused(route: Route, answer: Answer) -> bool:
    if route.method == "WS" and answer.closed:
        return True
    return answer.status in REFUSED


def is_unbuilt(route: Route, answer: Answer) -> bool:
    """Whether it is only there to say that it is not."""
    return not route.described and answer.status == 501


async def test_nobody_is_refused_everywhere(platform: Platform, victim: Victim) -> None:
    @contextlib.asynccontextmanager
    async def nobody() -> AsyncIterator[dict[str, str]]:
        yield {}

    before = await kept(platform, victim)
    wrong, tried = [], set()
    async for route, _, answer in try_all(platform, victim, nobody):
        tried.add(str(route))
        if str(route) in PUBLIC:
            assert not leaks(answer, victim), f"{route} shows what is not public"
        elif not is_refused(route, answer) or answer.status == 404:
            wrong.append(f"{route}: {answer.status}")
    assert wrong == [], "neither public nor refused to nobody"
    assert tried >= PUBLIC, "what is public is no route"
    assert await kept(platform, victim) == before


@pytest.mark.parametrize("by", ["key", "cookie"])
async def test_another_team_is_refused_everywhere(
    platform: Platform, victim: Victim, other_team: Team, by: str
) -> None:
    @contextlib.asynccontextmanager
    async def key() -> AsyncIterator[dict[str, str]]:
        yield {"x-api-key": other_team.key}

    @contextlib.asynccontextmanager
    async def cookie() -> AsyncIterator[dict[str, str]]:
        # A new session each time: some routes end them.
        async with logged_in(platform, user_id, other_team.team_id) as person:
            yield cookie_headers(person) | {"origin": "http://control"}

    user_id = await make_user(platform, "other@example.org")
    await add_member(platform, other_team.team_id, user_id, Role.OWNER)
    before = await kept(platform, victim)
    wrong = []
    async for route, names_it, answer in try_all(platform, victim, key if by == "key" else cookie):
        refused = is_refused(route, answer) or str(route) in PUBLIC | OF_ONES_OWN or not names_it
        broken = answer.status >= 500 and not is_unbuilt(route, answer)
        if not refused or broken or leaks(answer, victim):
            wrong.append(f"{route}: {answer.status} {answer.body[:200]!r}")
    assert wrong == []
    assert await kept(platform, victim) == before


async def test_a_cookie_changes_nothing_without_its_csrf_token(
    platform: Platform, victim: Victim
) -> None:
    tokens = iter(["", "wrong"] * 1000)

    @contextlib.asynccontextmanager
    async def forged() -> AsyncIterator[dict[str, str]]:
        headers = cookie_headers(victim.owner)
        yield headers | {"x-csrf-token": next(tokens), "origin": "http://elsewhere"}

    before = await kept(platform, victim)
    wrong = []
    async for route, _, answer in try_all(platform, victim, forged):
        changes = route.method not in {"GET", "WS"}
        if changes and str(route) not in PUBLIC | BY_TOKEN and answer.status != 403:
            wrong.append(f"{route}: {answer.status} {answer.body[:200]!r}")
        if route.method == "WS" and not is_refused(route, answer):
            wrong.append(f"{route} is open to other pages")
    assert wrong == []
    assert await kept(platform, victim) == before
    # The same session, with its token.
    renamed = await victim.owner.http.patch("/v1/me", json={"name": "Owner"})
    assert renamed.status_code == 200, renamed.text


async def test_the_owner_is_let_in(platform: Platform, victim: Victim) -> None:
    """What the others were refused is there."""
    ids = victim.ids
    for http in (victim.owner.http, victim.team.http):
        for path in (f"sandboxes/{ids['sandbox_id']}", f"teams/{ids['team_id']}"):
            assert (await http.get(f"/v1/{path}")).status_code == 200, path
    members = await victim.owner.http.get(f"/v1/teams/{ids['team_id']}/members")
    assert [each["user_id"] for each in members.json()] == [ids["user_id"]]
    keys = (await victim.owner.http.get("/v1/api-keys")).json()
    assert ids["key_id"] in {each["id"] for each in keys}
    assert (await victim.owner.http.delete(f"/v1/api-keys/{ids['key_id']}")).status_code == 204
    templates = (await victim.team.http.get("/v1/templates")).json()
    assert "mine" in {each["name"] for each in templates}


async def test_only_administrators_administer(platform: Platform, victim: Victim) -> None:
    app = create_app(platform)
    routes = [each for each in routes_of(app) if each.path.startswith("/v1/admin/")]
    bodies = Bodies(app.openapi()["components"]["schemas"], victim.ids)
    for route in routes:
        for headers in ({"x-api-key": victim.team.key}, cookie_headers(victim.owner)):
            answer = await ask(app, bodies.request(route, headers))
            assert answer.status == 403, route
    async with new_person(platform, victim.team.team_id, Role.MEMBER, is_admin=True) as admin:
        for route in (each for each in routes if each.method == "GET"):
            answer = await ask(app, bodies.request(route, cookie_headers(admin)))
            assert answer.status == 200, route


def cookie_headers(person: Person) -> dict[str, str]:
    request = person.http.build_request("GET", "/")
    return {name: request.headers[name] for name in ("cookie", "x-csrf-token")}


def leaks(answer: Answer, victim: Victim) -> bool:
    text = answer.body.decode(errors="replace")
    return answer.status < 400 and any(each in text for each in victim.secrets)


def test_the_bodies_fit() -> None:
    schema = {
        "type": "object",
        "required": ["a", "b"],
        "properties": {
            "a": {"type": "integer", "minimum": 3},
            "b": {"$ref": "#/components/schemas/B"},
            "c": {"type": "string"},
            "team_id": {"type": "string"},
        },
    }
    bodies = Bodies({"B": {"enum": ["x", "y"]}}, {"team_id": "t"})
    assert bodies.value(schema) == {"a": 3, "b": "x", "team_id": "t"}


async def test_texts_that_no_database_keeps(platform: Platform, team: Team) -> None:
    """NUL is no bug of ours, wherever it comes in."""
    labels = {"memory_mb": 128, "disk_size_mb": 8, "metadata": {"a": "\x00"}}
    answers = [
        await team.http.get("/v1/teams/%00"),
        await team.http.get("/v1/sandboxes/%00"),
        await team.http.get("/v1/sandboxes", params={"metadata": "a\x00=b"}),
        await team.http.post("/v1/sandboxes", json=labels),
        await team.http.post("/v1/auth/login", json={"email": "a\x00@b", "password": "x"}),
    ]
    assert [each.status_code for each in answers if each.status_code >= 500] == []
    assert answers[0].status_code in {400, 404}
