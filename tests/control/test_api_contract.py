"""The API is what its OpenAPI document says, whatever is asked of it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error as no_server_error
from schemathesis.core.result import Err, Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from sandmartin.control.platform import Platform
from tests.control.conftest import RunningHost, Team, make_team, running_platform
from tests.control.test_load import served
from tests.control.test_sandboxes import NEW

pytestmark = [pytest.mark.qemu_img, pytest.mark.timeout(180), pytest.mark.one_database]
#: For each of the databases.
_BUDGET_S = 30.0


def not_a_server_error(ctx: Any, response: Any, case: Any) -> bool | None:
    """What is said not to be served is answered, too."""
    if response.status_code == 501:
        return None
    return no_server_error(ctx, response, case)


_CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
#: Answers of a stream end when their client does.
_STREAMS = "text/event-stream"


def _is_stream(operation: Any) -> bool:
    responses = operation.definition.raw.get("responses", {}).values()
    return any(_STREAMS in each.get("content", {}) for each in responses)


def explore(url: str, key: str, sandbox_id: str) -> tuple[int, list[str]]:
    """Ask all that can be asked for, right and wrong; how much that was, and what failed."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found = list(schema.get_all_operations())
    failures = [str(each.err()) for each in found if isinstance(each, Err)]
    operations = [each.ok() for each in found if isinstance(each, Ok)]
    operations = [each for each in operations if not _is_stream(each)]
    asked = 0
    until = time.monotonic() + _BUDGET_S
    session = requests.Session()
    for done, operation in enumerate(operations):
        share_s = (until - time.monotonic()) / (len(operations) - done)
        for mode in GenerationMode:
            try:
                asked += _explore_one(operation, mode, session, key, sandbox_id, share_s / 2)
            except Unsatisfiable:
                # There is nothing that could be wrong about it.
                continue
            except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001
                failures.append(f"{operation.label}: {error}")
    session.close()
    return asked, failures


def _explore_one(
    operation: Any,
    mode: GenerationMode,
    session: requests.Session,
    key: str,
    sandbox_id: str,
    share_s: float,
) -> int:
    until, asked = time.monotonic() + share_s, 0

    @given(case=operation.as_strategy(mode))
    @settings(
        max_examples=12,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        nonlocal asked
        if time.monotonic() > until:
            return
        # One that is there, now and then: who only asks for what is not there learns little.
        if asked % 2 == 0 and "sandbox_id" in (case.path_parameters or {}):
            case.path_parameters["sandbox_id"] = sandbox_id
        asked += 1
        case.call_and_validate(
            session=session, headers={"x-api-key": key}, checks=_CHECKS, timeout=20
        )

    ask()
    return asked


@pytest.mark.filterwarnings("ignore")
async def test_whatever_is_asked_is_answered_as_documented(
    database_url: str, tmp_path: Path, host: RunningHost
) -> None:
    limits = {"max_sandboxes": 8, "max_memory_mb": 2048}
    async with running_platform(
        database_url,
        tmp_path,
        host,
        working=False,
        **limits,  # type: ignore[arg-type]
    ) as platform:
        _, key = await make_team(platform)
        async with served(platform) as (name, port):
            url = f"http://{name}:{port}"
            made = await asyncio.to_thread(
                requests.post, f"{url}/v1/sandboxes", json=NEW, headers={"x-api-key": key}
            )
            sandbox_id = made.json()["id"]
            asked, failures = await asyncio.to_thread(explore, url, key, sandbox_id)
    assert not failures, "\n\n".join(failures)
    assert asked > 100


def _error_form(document: dict[str, Any], route: dict[str, Any]) -> str:
    """What every error of a route looks like: E2B's clients know another form."""
    theirs = "e2b" in route["tags"]
    (name,) = [
        name
        for name, schema in document["components"]["schemas"].items()
        if set(schema.get("properties", {}))
        == ({"code", "message", "error_code"} if theirs else {"error"})
    ]
    return f"#/components/schemas/{name}"


async def test_the_document_is_complete(team: Team, platform: Platform) -> None:
    document = (await team.http.get("/openapi.json")).json()
    ids: set[str] = set()
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            name = f"{method} {path}"
            assert route["summary"] and route["tags"], name
            assert route["operationId"] not in ids, name
            ids.add(route["operationId"])
            error = route["responses"]["default"]["content"]["application/json"]["schema"]
            assert error == {"$ref": _error_form(document, route)}, name
            # What is never answered is not documented, either.
            assert "422" not in route["responses"], name
    # Every error has the documented form, also where no route is.
    form = set(document["components"]["schemas"]["ErrorDetail"]["properties"])
    for method, url in [("GET", "/nowhere"), ("PUT", "/v1/sandboxes"), ("GET", "/v1/sandboxes/x")]:
        answer = await team.http.request(method, url)
        assert set(answer.json()["error"]) == form
        assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]
