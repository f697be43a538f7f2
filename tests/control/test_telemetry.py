"""Figures for Prometheus, and log lines that say what they belong to and tell no secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import insert

from sandmartin.control import tables, telemetry
from sandmartin.control.app import create_app
from sandmartin.control.platform import Platform
from tests.control.conftest import Team, client_of, make_team, running_platform
from tests.control.test_sandboxes import NEW, create

pytestmark = pytest.mark.one_database


def figures(text: str) -> dict[tuple[str, ...], float]:
    """Values by name and labels' values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_figures(platform: Platform) -> None:
    _, key = await make_team(platform)
    async with client_of(platform, **{"x-api-key": key}) as http:
        team = Team("", key, http)
        made = await create(team)
        await http.post(f"/v1/sandboxes/{made['id']}/pause")
        again = await http.post(f"/v1/sandboxes/{made['id']}/pause")
        assert again.status_code == 409
        for number in range(20):
            assert (await http.get(f"/no/such/{number}")).status_code == 404
        answer = await http.get("/metrics")
    assert answer.status_code == 200
    found = figures(answer.text)
    pause = "/v1/sandboxes/{sandbox_id}/pause"
    assert found["sandmartin_request_seconds_count", "POST", pause, "200"] == 1
    assert found["sandmartin_request_seconds_count", "POST", pause, "409"] == 1
    assert found["sandmartin_request_seconds_count", "GET", "other", "404"] == 20
    assert found["sandmartin_operation_seconds_count", "create", "success"] == 1
    assert found["sandmartin_operation_seconds_count", "pause", "success"] == 1
    assert found["sandmartin_sandboxes", "paused"] == 1
    assert found["sandmartin_sandboxes", "running"] == 0
    assert found["sandmartin_hosts", "online"] == 1
    assert 0 <= found[("sandmartin_reconciler_lag_seconds",)] < 60
    assert found["sandmartin_db_connections", "idle"] >= 0
    assert found[("sandmartin_requests_open",)] == 1
    assert made["id"] not in answer.text


async def test_figures_are_for_those_who_may(
    migrated_sqlite: Path, tmp_path: Path, platform: Platform
) -> None:
    async with client_of(platform) as http:
        proxied = await http.get("/metrics", headers={"X-Forwarded-For": "127.0.0.1"})
        assert proxied.status_code == 403
    far = httpx.ASGITransport(create_app(platform), client=("192.0.2.7", 1234))
    async with httpx.AsyncClient(transport=far, base_url="http://control") as http:
        assert (await http.get("/metrics")).status_code == 403
    url = f"sqlite:///{tmp_path / 'another.sqlite3'}"
    async with (
        running_platform(url, tmp_path, metrics_token="secret") as guarded,
        client_of(guarded) as http,
    ):
        for header in ("", "Bearer wrong", "secret"):
            headers = {"Authorization": header}
            assert (await http.get("/metrics", headers=headers)).status_code == 403
        allowed = await http.get("/metrics", headers={"Authorization": "Bearer secret"})
        assert allowed.status_code == 200


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is logged as JSON lines; all is as it was afterwards."""
    root, stream = logging.getLogger(), io.StringIO()
    loggers = [root, *map(logging.getLogger, telemetry._TALKATIVE)]
    levels = [each.level for each in loggers]
    monkeypatch.setattr(root, "handlers", [])
    telemetry.set_up_logging("info", "json", stream)
    yield stream
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


async def test_log_lines_say_what_they_belong_to(
    log: io.StringIO, platform: Platform, team: Team
) -> None:
    secret = "sandmartins-secret"
    made = await create(team, envs={"TOKEN": secret})
    failed = await team.http.post("/v1/sandboxes", json={**NEW, "template": "nope"})
    path = f"/v1/sandboxes/{made['id']}"
    answer = await team.http.post(f"{path}/pause?token={secret}")
    # An error of the database with what it was given.
    with pytest.raises(Exception, match=r"(?i)unique") as raised:
        async with platform.db.write() as session:
            rows = [{"team_id": team.team_id, "name": secret, "created_at": 0.0}]
            await session.execute(insert(tables.Team).values(rows))
    logging.getLogger("sandmartin").error("a bug", exc_info=raised.value)
    said = log.getvalue()
    records = [json.loads(line) for line in said.splitlines()]
    (paused,) = [each for each in records if "/pause:" in each["message"]]
    assert paused["message"].startswith("POST /v1/sandboxes/{sandbox_id}/pause: 200 in ")
    assert paused["sandbox_id"] == made["id"]
    assert paused["request_id"] == answer.headers["x-request-id"]
    missing = failed.headers["x-request-id"]
    assert any(each.get("request_id") == missing and "404" in each["message"] for each in records)
    (bug,) = [each for each in records if each["message"] == "a bug"]
    assert "Traceback" in bug["error"]
    assert secret not in said
    assert team.key not in said
    assert not [each for each in records if each["logger"].startswith("httpx")]
