"""Code run by E2B's own package, as `sync` or `async`; says each step that went as it must.

Runs in an environment that has nothing of ours.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import sys

from e2b_code_interpreter import AsyncSandbox, Sandbox

KIND = AsyncSandbox if sys.argv[1] == "async" else Sandbox
PLOT = """
import matplotlib.pyplot as plt
plt.bar(["a", "b"], [1, 2])
plt.title("grains")
plt.show()
"""


async def done(value):
    """A value of either kind of client."""
    return await value if inspect.isawaitable(value) else value


async def state(sandbox):
    await done(sandbox.run_code("x = 20"))
    execution = await done(sandbox.run_code("print('said')\nx + 1"))
    assert execution.text == "21" and execution.error is None, execution
    assert execution.logs.stdout == ["said\n"], execution.logs


async def plot(sandbox):
    execution = await done(sandbox.run_code(PLOT))
    assert execution.error is None, execution.error
    (result,) = execution.results
    assert base64.b64decode(result.png).startswith(b"\x89PNG"), result
    assert result.chart.title == "grains" and result.chart.type.value == "bar", result.chart


async def table(sandbox):
    code = "import pandas as pd\npd.DataFrame({'a': [1, 2]})"
    execution = await done(sandbox.run_code(code))
    (result,) = execution.results
    assert "<table" in result.html, result


async def error(sandbox):
    execution = await done(sandbox.run_code("1 / 0"))
    assert execution.error.name == "ZeroDivisionError", execution
    assert "1 / 0" in execution.error.traceback, execution.error.traceback


async def streamed(sandbox):
    heard = []
    code = "for n in range(3): print(n, flush=True)"
    await done(sandbox.run_code(code, on_stdout=lambda message: heard.append(message.line)))
    assert "".join(heard) == "0\n1\n2\n", heard


async def contexts(sandbox):
    context = await done(sandbox.create_code_context(cwd="/tmp"))
    execution = await done(sandbox.run_code("import os; os.getcwd()", context=context))
    assert execution.text == "/tmp", execution
    execution = await done(sandbox.run_code("'x' in globals()", context=context))
    assert execution.text == "False", execution


async def envs(sandbox):
    execution = await done(sandbox.run_code("import os; os.environ['GREETING']"))
    assert execution.text == "hi", execution
    execution = await done(sandbox.run_code("os.environ['ONCE']", envs={"ONCE": "1"}))
    assert execution.text == "1", execution


async def languages(sandbox):
    execution = await done(sandbox.run_code("echo $((6 * 7))", language="bash"))
    assert "".join(execution.logs.stdout).strip() == "42", execution
    execution = await done(sandbox.run_code("[1, 2].map((n) => n * 2)", language="javascript"))
    assert "4" in execution.text, execution


async def main():
    sandbox = await done(KIND.create(timeout=240, envs={"GREETING": "hi"}))
    try:
        for step in (state, plot, table, error, streamed, contexts, envs, languages):
            await step(sandbox)
            print(step.__name__, flush=True)
    finally:
        await done(sandbox.kill())


asyncio.run(main())
