"""The code interpreter on a real VM: what its template starts answers as soon as it is created."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from sandmartin.client.sandbox import AsyncSandbox
from tests.vm.conftest import RunningAgent, execute

TEMPLATE = "code-interpreter-v1"
PORT = 49999
DEADLINE_S = 120.0
# In the default tier E2B's package shows it (tests/e2e), and real kernels outside a VM.
pytestmark = [pytest.mark.template(TEMPLATE), pytest.mark.timeout(400), pytest.mark.full]


@pytest.fixture(scope="module")
async def sandbox(agent: RunningAgent) -> AsyncIterator[AsyncSandbox]:
    """The module's sandbox."""
    async with agent.sandbox(template=TEMPLATE) as sandbox:
        yield sandbox


@pytest.fixture
async def client(agent: RunningAgent, sandbox: AsyncSandbox) -> AsyncIterator[httpx.AsyncClient]:
    """Of what serves in the sandbox, from the host."""
    async with client_of(agent, sandbox) as client:
        yield client


def client_of(agent: RunningAgent, sandbox: AsyncSandbox) -> httpx.AsyncClient:
    address = agent.host_ip(sandbox.sandbox_id)
    return httpx.AsyncClient(base_url=f"http://{address}:{PORT}", timeout=DEADLINE_S)


async def run(client: httpx.AsyncClient, code: str, **more: object) -> list[dict[str, Any]]:
    """All that code gives, but signs of life."""
    items = []
    async with client.stream("POST", "/execute", json={"code": code, **more}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            items.append(json.loads(line))
    assert items[-1] == {"type": "end_of_execution"}
    return [item for item in items[:-1] if item["type"] != "keepalive"]


async def result(client: httpx.AsyncClient, code: str, **more: object) -> dict[str, Any]:
    """The only result of code."""
    items = await run(client, code, **more)
    (found,) = (item for item in items if item["type"] == "result")
    return found


async def test_answers_at_once_and_keeps_state(agent: RunningAgent, sandbox: AsyncSandbox) -> None:
    async with agent.sandbox(template=TEMPLATE) as fresh, client_of(agent, fresh) as client:
        began = time.monotonic()
        assert (await run(client, "6 * 7"))[0]["execution_count"] == 1
        first_s = time.monotonic() - began
        await run(client, "x = 20")
        assert (await result(client, "x + 1"))["text"] == "21"
        assert (await fresh.info()).memory_mb == 1024
        # Its kernel runs already: another one takes longer to start than this took to answer.
        began = time.monotonic()
        made = await client.post("/contexts", json={})
        kernel_s = time.monotonic() - began
        assert made.status_code == 200
        assert first_s < kernel_s / 2, (first_s, kernel_s)


async def test_picture_chart_and_table(client: httpx.AsyncClient) -> None:
    drawn = await result(
        client,
        "import matplotlib.pyplot as plt\n"
        "plt.plot([1, 2], [3, 4], label='line')\n"
        "plt.xlabel('time (s)')\nplt.title('T')\nplt.show()",
    )
    assert base64.b64decode(drawn["png"]).startswith(b"\x89PNG")
    assert drawn["is_main_result"] is False
    chart = drawn["chart"]
    assert (chart["type"], chart["title"], chart["x_unit"]) == ("line", "T", "s")
    assert chart["elements"] == [{"label": "line", "points": [[1.0, 3.0], [2.0, 4.0]]}]
    table = await result(
        client, "import pandas as pd\npd.DataFrame({'a': [1, float('nan')], 'b': ['x', 'y']})"
    )
    assert "<table" in table["html"] and table["is_main_result"] is True
    assert table["data"] == {"a": [1.0, None], "b": ["x", "y"]}


CHARTS = {
    "scatter": "plt.scatter([1], [2])",
    "bar": "plt.bar(['a', 'b'], [1, 2], label='g')",
    "pie": "plt.pie([1, 3], labels=['a', 'b'])",
    "box_and_whisker": "plt.boxplot([[1, 2, 3, 4, 20]], tick_labels=['u'])",
    "superchart": "f, axes = plt.subplots(2); axes[0].plot([1]); axes[1].bar([1], [2])",
    "unknown": "plt.imshow([[1, 2]])",
}
ELEMENTS = {
    "scatter": [{"label": "Series 1", "points": [[1.0, 2.0]]}],
    "bar": [
        {"label": "a", "group": "g", "value": 1},
        {"label": "b", "group": "g", "value": 2},
    ],
    "pie": [
        {"label": "a", "angle": 90.0, "radius": 1},
        {"label": "b", "angle": 270.0, "radius": 1},
    ],
    "box_and_whisker": [
        {
            "label": "u",
            "min": 1.0,
            "first_quartile": 2.0,
            "median": 3.0,
            "third_quartile": 4.0,
            "max": 4.0,
            "outliers": [20.0],
        }
    ],
    "unknown": [],
}


async def test_kinds_of_charts(client: httpx.AsyncClient) -> None:
    for kind, code in CHARTS.items():
        found = await result(client, f"import matplotlib.pyplot as plt\n{code};")
        assert found["chart"]["type"] == kind
        if kind in ELEMENTS:
            assert found["chart"]["elements"] == ELEMENTS[kind]
        else:
            kinds = [each["type"] for each in found["chart"]["elements"]]
            assert kinds == ["line", "bar"]


async def test_error_has_its_traceback(client: httpx.AsyncClient) -> None:
    (_, error) = await run(client, "def f():\n    return 1 / 0\nf()")
    assert (error["type"], error["name"]) == ("error", "ZeroDivisionError")
    assert "return 1 / 0" in error["traceback"] and "\x1b" not in error["traceback"]


async def test_other_languages(client: httpx.AsyncClient) -> None:
    items = await run(client, "X=5; echo $((X + 1)) $HOME; false", language="bash")
    assert [i["text"] for i in items if i["type"] == "stdout"] == ["6 /home/user\n"]
    assert items[-1]["type"] == "error" and items[-1]["value"] == "1"
    items = await run(client, "const a = 2; console.log('hi'); a * 4", language="javascript")
    assert [i["text"] for i in items if i["type"] in {"stdout", "result"}] == ["hi\n", "8"]
    typed = await result(client, "let b: number = a + 1; b", language="typescript")
    assert typed["text"] == "3"


async def test_runs_as_the_user_and_finds_what_it_installs(
    client: httpx.AsyncClient, sandbox: AsyncSandbox
) -> None:
    found = await result(client, "import getpass, os; (getpass.getuser(), os.getcwd())")
    assert found["text"] == "('user', '/home/user')"
    await execute(
        sandbox,
        "sh",
        "-c",
        "echo 'value = 7' >~/.local/lib/python3.11/site-packages/added.py",
        user="user",
    )
    assert (await result(client, "import added; added.value"))["text"] == "7"


async def test_who_hangs_up_interrupts(client: httpx.AsyncClient) -> None:
    code = (
        "import time\nprint('begun')\ntry:\n    time.sleep(300)\n"
        "except KeyboardInterrupt:\n    ended = 'early'\n    raise"
    )
    async with client.stream("POST", "/execute", json={"code": code}) as response:
        async for line in response.aiter_lines():
            if "begun" in line:
                break
    assert (await result(client, "ended"))["text"] == "early"


_NUMBERS = "import random, numpy\n[random.random(), float(numpy.random.random())]"


async def _numbers(client: httpx.AsyncClient) -> set[float]:
    return set(json.loads((await result(client, _NUMBERS))["text"]))


async def test_no_two_draw_the_same_numbers(agent: RunningAgent) -> None:
    drawn = set()
    async with agent.sandbox(template=TEMPLATE) as one, client_of(agent, one) as client:
        drawn |= await _numbers(client)
        await run(client, "random.seed(5)")
        await agent.transport.pause(one.sandbox_id)
        await agent.transport.resume(one.sandbox_id, None)
        # The same sandbox goes on with its own.
        async with client_of(agent, one) as again:
            assert (await result(again, "random.random()"))["text"] == "0.6229016948897019"
        for child in await one.fork(2):
            sandbox = AsyncSandbox(agent.transport, child.sandbox_id)
            try:
                async with client_of(agent, sandbox) as born:
                    drawn |= await _numbers(born)
            finally:
                await sandbox.destroy()
    async with agent.sandbox(template=TEMPLATE) as two, client_of(agent, two) as client:
        drawn |= await _numbers(client)
    assert len(drawn) == 8


async def test_context_of_its_own(client: httpx.AsyncClient) -> None:
    made = await client.post("/contexts", json={"cwd": "/tmp"})
    context = made.json()
    assert (context["language"], context["cwd"]) == ("python", "/tmp")
    where = await result(client, "import os; os.getcwd()", context_id=context["id"])
    assert where["text"] == "/tmp"
    assert context in (await client.get("/contexts")).json()
    assert (await client.delete(f"/contexts/{context['id']}")).status_code == 204
