"""What is secret is in no log, event, audit record, figure, error or command line.

A sandbox lives its whole life on a real `up` that logs all there is to log; whatever is told of it
meanwhile to those who may not see its secrets is searched for them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from sandmartin.model import new_sandbox_id
from tests.e2e.conftest import Place
from tests.e2e.test_up import Up, clear, up

pytestmark = pytest.mark.timeout(300)
_OPEN, _CLOSED, _GUEST = 8000, 8001, 49983


def _secret(what: str) -> str:
    """Looks the same however it is quoted."""
    return f"{what}-{uuid4().hex}"


@dataclass
class Watch:
    """The secrets of one life, and all that was told meanwhile."""

    secrets: dict[str, str] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)

    def new(self, what: str) -> str:
        return self.known(what, _secret("nest"))

    def known(self, what: str, value: str) -> str:
        assert len(value) >= 16, what
        self.secrets[what] = value
        return value

    def hear(self, where: str, text: str) -> None:
        self.told[where] = f"{self.told.get(where, '')}\n{text}"

    def found(self) -> set[str]:
        return {
            f"{what} in {where}"
            for where, text in self.told.items()
            for what, value in self.secrets.items()
            if value in text
        }


@dataclass
class Client:
    """Asks, and keeps what is said of what goes wrong."""

    http: httpx.Client
    watch: Watch

    def ask(self, expect: int, method: str, path: str, **words: Any) -> httpx.Response:
        answer = self.http.request(method, path, **words)
        said = f"{method} {path}"
        assert answer.status_code == expect, (said, answer.status_code, answer.text)
        if expect >= 400:
            self.watch.hear(f"the error of {said}", f"{answer.headers}{answer.text}")
        return answer

    def hear(self, path: str) -> None:
        """What a list tells, which must not be empty."""
        answer = self.ask(200, "GET", path)
        found = answer.json()
        assert found if isinstance(found, list) else found["items"], path
        self.watch.hear(path.partition("?")[0], answer.text)

    def hear_events(self, sandbox_id: str) -> None:
        """All events so far, among them the end of a sandbox."""
        with self.http.stream("GET", "/v1/events?after=0") as answer:
            for line in answer.iter_lines():
                self.watch.hear("the events", line)
                if line.startswith(": "):
                    break
        told = self.watch.told["the events"]
        assert sandbox_id in told and "event: sandbox.stopped" in told, told


@contextlib.contextmanager
def client(one: Up, watch: Watch, **headers: str) -> Iterator[Client]:
    with httpx.Client(base_url=one.url, headers=headers, timeout=60, trust_env=False) as http:
        yield Client(http, watch)


def _hear_command_lines(watch: Watch) -> None:
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            watch.hear("a command line", process.read_bytes().decode(errors="replace"))


def _accounts(one: Up, watch: Watch) -> None:
    """Sign up, log in, be refused, change the password."""
    email, password = "ann@example.org", watch.new("a password")
    with client(one, watch, origin=one.url) as page:
        answer = page.ask(
            201, "POST", "/v1/auth/signup", json={"email": email, "password": password}
        )
        page.http.headers["x-csrf-token"] = answer.json()["csrf_token"]
        watch.known("a session", page.http.cookies["sandmartin_session"])
        changed = {"current": watch.new("a wrong password"), "new": watch.new("a new password")}
        page.ask(403, "POST", "/v1/me/password", json=changed)
        page.ask(204, "POST", "/v1/me/password", json={**changed, "current": password})
        made = page.ask(201, "POST", "/v1/api-keys", json={"name": "ci"}).json()
        watch.known("a key that was made", made["key"])
    with client(one, watch, origin=one.url) as page:
        guess = watch.secrets["a wrong password"]
        wrong: dict[str, Any] = {"email": email, "password": guess}
        page.ask(401, "POST", "/v1/auth/login", json=wrong)
        for bad in ([guess], {"is": guess}):
            page.ask(400, "POST", "/v1/auth/login", json={**wrong, "password": bad})
        long = guess * 100
        page.ask(400, "POST", "/v1/auth/signup", json={"email": email, "password": long})
        page.ask(400, "POST", "/v1/auth/signup", json={**wrong, "more": 1})


def _refusals(team: Client, envs: Mapping[str, str], registry: Mapping[str, str]) -> None:
    """Requests with secrets in them that are no requests."""
    secret = envs["TOKEN"]
    creates: list[dict[str, Any]] = [
        {"envs": envs, "memory_mb": "much"},
        {"envs": {"TOKEN": [secret]}},
        {"envs": [secret]},
        {"envs": {"BAD=": secret}},
        {"envs": envs, "template": "absent"},
        {"envs": envs, "unknown": 1},
        {"token": secret},
    ]
    for bad in creates:
        answer = team.http.post("/v1/sandboxes", json=bad)
        assert answer.status_code in {400, 404}, (bad, answer.text)
        team.watch.hear("the error of a create", f"{answer.headers}{answer.text}")
        bad["envVars"], bad["templateID"] = bad.pop("envs", secret), "base"
        answer = team.http.post("/sandboxes", json={**bad, "timeout": "long"})
        assert answer.status_code == 400, answer.text
        team.watch.hear("the error of a create by E2B's API", f"{answer.headers}{answer.text}")
    build: dict[str, Any] = {"name": "app", "from_image": "127.0.0.1:1/x", "registry": registry}
    for bad in (build, {**build, "secrets": [secret]}, {**build, "registry": [*registry.values()]}):
        answer = team.http.post("/v1/builds", json=bad)
        team.watch.hear("the answer to a build", f"{answer.headers}{answer.text}")
    answer = team.http.post("/v1/sandboxes", content=f'{{"envs": {{"TOKEN": "{secret}"')
    assert answer.status_code == 400
    team.watch.hear("the error of broken JSON", answer.text)


def _traffic(team: Client, sandbox_id: str, access: Mapping[str, str]) -> None:
    """Requests to the sandbox's ports that are refused, with the right tokens and the wrong."""
    watch = team.watch
    token = watch.known("an access token", access["access_token"])
    traffic = watch.known("a traffic token", access["traffic_token"])
    for port, name, value in (
        (_GUEST, "X-Access-Token", token[:-1]),
        (_GUEST, "X-Access-Token", watch.new("a wrong access token")),
        (_OPEN, "X-Traffic-Token", watch.new("a wrong traffic token")),
        (_CLOSED, "X-Traffic-Token", traffic),
    ):
        at = {"e2b-sandbox-id": sandbox_id, "e2b-sandbox-port": str(port), name: value}
        answer = team.http.get("/files", params={"path": "/x"}, headers=at)
        assert answer.status_code in {401, 403, 502}, (port, answer.text)
        watch.hear("the error of traffic", f"{answer.headers}{answer.text}")
    signed = {"path": "/x", "signature": f"v1_{watch.new('a wrong signature')}", "username": "user"}
    at = {"e2b-sandbox-id": sandbox_id, "e2b-sandbox-port": str(_GUEST)}
    answer = team.http.get("/files", params=signed, headers=at)
    assert answer.status_code == 401
    watch.hear("the error of a signed address", f"{answer.headers}{answer.text}")


def _life(team: Client, envs: Mapping[str, str]) -> str:
    """Create, use, pause, fork, snapshot and end one; its id."""
    watch = team.watch
    wanted = {
        "memory_mb": 256,
        "envs": envs,
        "metadata": {"colour": "sand"},
        "public_traffic": False,
    }
    sandbox_id = str(team.ask(201, "POST", "/v1/sandboxes", json=wanted).json()["id"])
    path = f"/v1/sandboxes/{sandbox_id}"
    own = {"ONCE": watch.new("a variable of a command")}
    command = {"cmd": "sh", "args": ["-c", 'echo "$TOKEN$ONCE" | wc -c; sleep 1'], "envs": own}
    said = team.ask(200, "POST", f"{path}/exec", json=command).json()
    assert int(said["stdout"]) == len(envs["TOKEN"]) + len(own["ONCE"]) + 1
    _hear_command_lines(watch)
    failing = {"cmd": "/absent", "envs": own}
    team.watch.hear("a failure", team.http.post(f"{path}/exec", json=failing).text)
    team.ask(404, "POST", f"/v1/sandboxes/{new_sandbox_id()}/exec", json=command)
    _traffic(team, sandbox_id, team.ask(200, "GET", f"{path}/access").json())
    team.ask(200, "POST", f"{path}/pause")
    team.ask(409, "POST", f"{path}/exec", json=command)
    team.ask(200, "POST", f"{path}/resume")
    (child,) = team.ask(201, "POST", f"{path}/fork", json={"count": 1}).json()["items"]
    team.ask(204, "DELETE", f"/v1/sandboxes/{child['id']}")
    team.ask(201, "POST", f"{path}/checkpoints", json={"comment": "c"})
    _hear_command_lines(watch)
    for each in ("", "/timeline", "/checkpoints", "/metrics", "/console"):
        watch.hear(f"GET {each or 'the sandbox'}", team.ask(200, "GET", f"{path}{each}").text)
    watch.hear("E2B's logs", team.ask(200, "GET", f"/sandboxes/{sandbox_id}/logs").text)
    team.ask(204, "DELETE", path)
    return sandbox_id


def test_no_secret_of_a_whole_life_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDMARTIN_SIGN_UP", "open")
    watch = Watch()
    with up(place, "data", "--log-level", "debug", "--log-format", "json") as one:
        watch.known("the key", one.key)
        envs = {"TOKEN": watch.new("a variable")}
        registry = {"username": "ann", "password": watch.new("a registry's password")}
        matrix = {"access_token": watch.new("a channel's token"), "room_id": "!r:x"}
        _accounts(one, watch)
        with client(one, watch, **{"x-api-key": one.key}) as team:
            channel = {"name": "m", "type": "matrix"}
            config = {**matrix, "homeserver": "https://192.0.2.1"}
            team.ask(201, "POST", "/v1/channels", json={**channel, "config": config})
            team.ask(400, "POST", "/v1/channels", json={**channel, "config": {**matrix, "x": "y"}})
            _refusals(team, envs, registry)
            sandbox_id = _life(team, envs)
            team.hear_events(sandbox_id)
            for listed in ("audit-logs?limit=100", "channels", "api-keys"):
                team.hear(f"/v1/{listed}")
            assert "sandbox.created" in watch.told["/v1/audit-logs"]
            watch.hear("/metrics", team.ask(200, "GET", "/metrics").text)
        with client(one, watch, **{"x-api-key": watch.new("a wrong key")}) as stranger:
            stranger.ask(401, "GET", "/v1/sandboxes")
        stopped = one.end()
    watch.hear("the log", stopped)
    lines = [json.loads(line) for line in stopped.splitlines() if line.startswith("{")]
    assert {"debug"} & {each["level"] for each in lines} and sandbox_id in stopped
    # Keys and passwords are kept as hashes, and tokens of sandboxes nowhere.
    kept = {n: v for n, v in watch.secrets.items() if "variable" not in n}
    for file in place.data_dir().rglob("*.sqlite3*"):
        content = file.read_bytes()
        assert not {name for name, value in kept.items() if value.encode() in content}, file
    assert not watch.found()
    clear(place, "data")
