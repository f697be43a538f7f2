"""What the control plane adds: the same calls over its REST API, and of its host directly.

Both go to one agent, in turns, so that what the agent and the guest take is in both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

import httpx

from bench import budgets
from bench.agents import Bench, Up
from bench.inside import TRUE, run
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.model import DEFAULT_MEMORY_MB

_UNCOUNTED = 4
_SETTLE_S = 5.0
_CALL_S = 60.0


async def measure_control(bench: Bench) -> None:
    """A call that only the agent answers, and one that goes into the guest."""
    async with bench.up() as up, _client(up) as http:
        sandbox_id = await _create(http)
        # The agent makes the next one's VMM meanwhile.
        await asyncio.sleep(_SETTLE_S)
        direct = AsyncSandbox(up.transport, sandbox_id)

        async def ping() -> None:
            await _post(http, f"/v1/sandboxes/{sandbox_id}/ping")

        async def exec_true() -> None:
            answer = await _post(http, f"/v1/sandboxes/{sandbox_id}/exec", {"cmd": TRUE})
            if answer.json()["exit_code"]:
                raise RuntimeError(f"{TRUE} failed: {answer.text}")

        await _in_turns(
            bench, "ping", budgets.PING_EXTRA, ping, lambda: up.transport.ping(sandbox_id)
        )
        await _in_turns(
            bench, "exec of true", budgets.REST_EXTRA, exec_true, lambda: run(direct, TRUE)
        )


async def _in_turns(
    bench: Bench,
    name: str,
    extra: str,
    over: Callable[[], Awaitable[object]],
    directly: Callable[[], Awaitable[object]],
) -> None:
    ways = [(f"{name}, over REST", over), (f"{name}, of the host directly", directly)]
    for number in range(2 * bench.runs + _UNCOUNTED):
        took_ms = {}
        for figure, call in ways if number % 2 else reversed(ways):
            began = time.monotonic()
            await call()
            took_ms[figure] = (time.monotonic() - began) * 1000
        # The first ones load code, in the guest and here.
        if number >= _UNCOUNTED:
            for figure, took in took_ms.items():
                bench.figures.add(figure, took)
            bench.figures.add(extra, took_ms[ways[0][0]] - took_ms[ways[1][0]])


def _client(up: Up) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=up.url, headers={"x-api-key": up.api_key}, timeout=_CALL_S, trust_env=False
    )


async def _create(http: httpx.AsyncClient) -> str:
    made = await _post(http, "/v1/sandboxes", {"memory_mb": DEFAULT_MEMORY_MB})
    return str(made.json()["id"])


async def _post(
    http: httpx.AsyncClient, path: str, body: Mapping[str, object] | None = None
) -> httpx.Response:
    answer = await http.post(path, json=body)
    if not answer.is_success:
        raise RuntimeError(f"{path}: HTTP {answer.status_code}: {answer.text[:500]}")
    return answer
