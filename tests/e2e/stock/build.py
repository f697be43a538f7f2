"""Templates built by E2B's own package, as `sync` or `async`.

Runs in an environment that has nothing of ours, and says each step that went as it must.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import tempfile
import uuid
from pathlib import Path

import e2b
from e2b import AsyncSandbox, AsyncTemplate, Sandbox, Template

IS_ASYNC = sys.argv[1] == "async"
TEMPLATE = AsyncTemplate if IS_ASYNC else Template
SANDBOX = AsyncSandbox if IS_ASYNC else Sandbox
#: Of this run alone.
NAME = f"built-{uuid.uuid4().hex[:12]}"
TAGGED = "tags" in inspect.signature(TEMPLATE.build).parameters
SERVE = "python3 -m http.server 8000 --directory /srv/app"
READY = "curl -fs -o /dev/null http://localhost:8000/hello.txt"


async def done(value):
    """A value of either kind of client."""
    return await value if inspect.isawaitable(value) else value


async def fails(error, act):
    """The error that a call ends with, which must be of this kind."""
    try:
        await done(act())
    except error as found:
        return found
    raise AssertionError(f"no {error}")


def files():
    """A directory to copy from."""
    made = Path(tempfile.mkdtemp(prefix="context-"))
    (made / "site/deep").mkdir(parents=True)
    (made / "site/hello.txt").write_text("hello\n")
    (made / "site/deep/more.txt").write_text("more\n")
    (made / "run.sh").write_text("#!/bin/sh\necho ran\n")
    return made


def template(context, last="true"):
    ground = TEMPLATE(file_context_path=str(context)).from_template("base")
    return (
        ground.set_envs({"COLOUR": "sand"})
        .run_cmd("echo $COLOUR $(id -un) >made && sleep 1.5")
        .copy("site", "/srv/app/", user="root")
        .copy("run.sh", "bin/run", mode=0o755)
        .set_workdir("/srv/app")
        .run_cmd(last)
        .set_start_cmd(SERVE, READY)
    )


async def build(made, name, log=None, **more):
    named = (
        {"name": name}
        if "name" in inspect.signature(TEMPLATE.build).parameters
        else {"alias": name}
    )
    on_log = (lambda entry: log.append(str(entry.message))) if log is not None else None
    return await done(
        TEMPLATE.build(made, **named, cpu_count=1, memory_mb=512, on_build_logs=on_log, **more)
    )


async def says(sandbox, command, **more):
    return (await done(sandbox.commands.run(command, **more))).stdout


async def builds(context):
    log = []
    info = await build(
        template(context), NAME, log, **({"tags": ["default", "v1"]} if TAGGED else {})
    )
    assert info.template_id == NAME and info.build_id, info
    assert any("sleep 1.5" in each for each in log), log


async def exists(_):
    look = getattr(TEMPLATE, "exists", None) or getattr(TEMPLATE, "alias_exists", None)
    if look is not None:
        assert await done(look(NAME)) is True
        assert await done(look(f"{NAME}-not")) is False


async def starts(_):
    sandbox = await done(SANDBOX.create(NAME, timeout=120))
    assert await says(sandbox, "cat /home/user/made") == "sand user\n"
    assert await says(sandbox, "curl -fs localhost:8000/deep/more.txt") == "more\n"
    assert (
        await says(sandbox, "/home/user/bin/run; stat -c '%U %a' /home/user/bin/run")
        == "ran\nuser 755\n"
    )
    assert await says(sandbox, "stat -c %U /srv/app/hello.txt") == "root\n"
    await done(sandbox.kill())


async def again(context):
    log = []
    await build(template(context, "echo last >/tmp/last"), NAME, log)
    assert any("(cached)" in each for each in log), log
    if hasattr(TEMPLATE, "assign_tags"):
        assert any(each.startswith("Skipping upload") for each in log), log


async def tags(_):
    if not hasattr(TEMPLATE, "assign_tags"):
        return
    given = await done(TEMPLATE.assign_tags(f"{NAME}:v1", ["production", "stable"]))
    assert sorted(given.tags) == ["production", "stable"], given
    if hasattr(TEMPLATE, "get_tags"):
        found = {each.tag: each.build_id for each in await done(TEMPLATE.get_tags(NAME))}
        assert set(found) == {"default", "v1", "production", "stable"}, found
        assert found["production"] == found["v1"] == given.build_id != found["default"], found
    sandbox = await done(SANDBOX.create(f"{NAME}:production", timeout=60))
    assert await says(sandbox, "cat /home/user/made; ls /tmp") == "sand user\n"
    await done(sandbox.kill())
    await done(TEMPLATE.remove_tags(NAME, ["production", "stable"]))
    await fails(Exception, lambda: SANDBOX.create(f"{NAME}:production"))


async def failing(context):
    log = []
    failed = await fails(
        e2b.BuildException,
        lambda: build(template(context, "echo why >&2; exit 7"), f"{NAME}-no", log),
    )
    assert "7" in str(failed), failed
    assert any("why" in each for each in log), log
    refused = await fails(e2b.BuildException, lambda: build(template(context), "base"))
    assert "platform" in str(refused), refused


async def background(context):
    start = getattr(TEMPLATE, "build_in_background", None)
    if start is None:
        return
    info = await done(
        start(
            TEMPLATE(file_context_path=str(context)).from_template("base").run_cmd("true"),
            f"{NAME}-more",
        )
    )
    status = "building"
    for _ in range(600):
        told = await done(TEMPLATE.get_build_status(info))
        status = told.status.value
        if status not in {"building", "waiting"}:
            break
        await asyncio.sleep(0.2)
    assert status == "ready", told


async def main():
    context = files()
    for step in (builds, exists, starts, again, tags, failing, background):
        if step.__name__ in sys.argv[2:] or not sys.argv[2:]:
            await step(context)
            print(step.__name__, flush=True)


asyncio.run(main())
# As in `life.py`.
os._exit(0)
