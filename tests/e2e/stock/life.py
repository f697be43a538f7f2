"""The life of a sandbox by E2B's own package, as `sync` or `async`; all steps, or those named.

Runs in an environment that has nothing of ours, and says each step that went as it must.
"""

from __future__ import annotations

import asyncio
import datetime
import importlib.metadata
import inspect
import os
import subprocess
import sys
import time
import uuid

import e2b
from e2b import AsyncSandbox, Sandbox, SandboxQuery

KIND = AsyncSandbox if sys.argv[1] == "async" else Sandbox
RELEASE = tuple(int(each) for each in importlib.metadata.version("e2b").split(".")[:2])
DEADLINE_S = 30.0
#: Of this run alone.
RUN = uuid.uuid4().hex
#: Where sandboxes have names; without it there is one address for all.
DOMAIN = os.environ.get("E2B_DOMAIN", "")
LABELS = {"colour": "sand & sea", "run": RUN, "n": "1"}


async def done(value):
    """A value of either kind of client."""
    return await value if inspect.isawaitable(value) else value


async def fails(error, act):
    """The error that a call ends with, which must be of this kind."""
    try:
        await done(act())
    except error as found:
        return found
    raise AssertionError(f"no {error.__name__}")


async def until(look, what):
    end = time.monotonic() + DEADLINE_S
    while not (found := await done(look())):
        assert time.monotonic() < end, f"never came: {what}"
        await asyncio.sleep(0.1)
    return found


async def says(sandbox, command, **more):
    return (await done(sandbox.commands.run(command, **more))).stdout


def curl(url, *words, said=""):
    """The status and the body of an answer to a client that knows nothing of sandboxes."""
    command = ["curl", "-sS", "-m", "60", "-w", "\n%{http_code}", *words, url]
    answer = subprocess.run(command, input=said, capture_output=True, text=True, check=True)
    body, _, status = answer.stdout.rpartition("\n")
    return int(status), body


def visit(sandbox, port, path="/"):
    """What a port of a sandbox answers: at its name if it has one, else by headers."""
    if DOMAIN:
        assert sandbox.get_host(port) == f"{port}-{sandbox.sandbox_id}.{DOMAIN}"
        return curl(f"https://{sandbox.get_host(port)}{path}")
    named = ("-H", f"E2b-Sandbox-Id: {sandbox.sandbox_id}", "-H", f"E2b-Sandbox-Port: {port}")
    return curl(os.environ["E2B_SANDBOX_URL"] + path, *named)


async def serve(sandbox, port):
    """A server of what is in the sandbox's /dev/shm, which answers."""
    command = f"nohup python3 -m http.server {port} --directory /dev/shm >/dev/null 2>&1 &"
    await done(sandbox.commands.run(command))

    async def answers():
        return visit(sandbox, port)[0] == 200

    await until(answers, "a server in the sandbox")


async def sleep(sandbox):
    act = getattr(sandbox, "pause", None) or sandbox.beta_pause
    await done(act())
    assert await state(sandbox) == "paused"


async def state(sandbox):
    return str((await done(sandbox.get_info())).state.value)


# Steps.


async def create():
    sandbox = await done(KIND.create(timeout=240, metadata=LABELS, envs={"GREETING": "hi"}))
    assert await done(sandbox.is_running())
    info = await done(sandbox.get_info())
    assert info.metadata == LABELS and info.template_id == "base", info
    left = info.end_at - datetime.datetime.now(datetime.UTC)
    assert 200 < left.total_seconds() <= 240, left
    return sandbox


async def run(sandbox):
    assert await says(sandbox, 'echo "$GREETING $(id -un) $PWD"') == "hi user /home/user\n"
    more = {"cwd": "/tmp", "envs": {"A": "b c"}, "user": "root"}
    assert await says(sandbox, 'echo "$A $(id -un) $PWD"', **more) == "b c root /tmp\n"
    assert await says(sandbox, "sudo id -un") == "root\n"
    failed = await fails(
        e2b.CommandExitException, lambda: sandbox.commands.run("echo no >&2; exit 3")
    )
    assert (failed.exit_code, failed.stderr) == (3, "no\n")
    heard = []
    await done(sandbox.commands.run("echo a; sleep .3; echo b", on_stdout=heard.append))
    assert "".join(map(str, heard)) == "a\nb\n"
    late = await fails(Exception, lambda: sandbox.commands.run("sleep 60", timeout=1))
    # Older releases wait for no longer than the command may run: their own wait may end first.
    own = set() if RELEASE >= (2, 35) else {"ReadTimeout"}
    assert isinstance(late, e2b.TimeoutException) or type(late).__name__ in own, late


async def background(sandbox):
    more = {"stdin": True} if "stdin" in inspect.signature(sandbox.commands.run).parameters else {}
    command = await done(sandbox.commands.run("read x; echo got $x", background=True, **more))
    assert command.pid in {each.pid for each in await done(sandbox.commands.list())}
    await done(sandbox.commands.send_stdin(command.pid, "word\n"))
    assert (await done(command.wait())).stdout == "got word\n"
    sleeping = await done(sandbox.commands.run("sleep 300", background=True))
    again = await done(sandbox.commands.connect(sleeping.pid))
    assert await done(sandbox.commands.kill(sleeping.pid)) is True
    # It is gone once its end is told, not as soon as the signal is sent.
    await fails(e2b.CommandExitException, again.wait)
    assert await done(sandbox.commands.kill(sleeping.pid)) is False


async def pty(sandbox):
    heard = []
    size = e2b.PtySize(rows=30, cols=90) if hasattr(e2b, "PtySize") else None
    if KIND is AsyncSandbox:
        terminal = await sandbox.pty.create(size, heard.append)
    else:
        terminal = sandbox.pty.create(size)
    await done(sandbox.pty.send_stdin(terminal.pid, b"stty size; echo $((6*7)); exit\n"))
    if KIND is AsyncSandbox:
        await terminal.wait()
    else:
        terminal.wait(on_pty=heard.append)
    said = b"".join(heard).decode()
    assert "30 90" in said and "42" in said, said


async def files(sandbox):
    written = await done(sandbox.files.write("a/b/text.txt", "words"))
    assert written.path == "/home/user/a/b/text.txt", written
    assert await done(sandbox.files.read("a/b/text.txt")) == "words"
    content = bytes(range(256)) * 5000
    await done(sandbox.files.write("/home/user/blob", content))
    assert bytes(await done(sandbox.files.read("blob", format="bytes"))) == content
    assert [each.name for each in await done(sandbox.files.list("a"))] == ["b"]
    assert await done(sandbox.files.make_dir("d")) is True
    assert await done(sandbox.files.make_dir("d")) is False
    await done(sandbox.files.rename("blob", "d/blob"))
    assert await done(sandbox.files.exists("d/blob"))
    assert not await done(sandbox.files.exists("blob"))
    info = await done(sandbox.files.get_info("d/blob"))
    assert (info.size, info.owner, info.permissions) == (len(content), "user", "-rw-r--r--"), info
    await done(sandbox.files.remove("d"))
    missing = getattr(e2b, "FileNotFoundException", e2b.NotFoundException)
    await fails(missing, lambda: sandbox.files.read("d/blob"))


async def signed(sandbox):
    """Addresses of files that say enough by themselves."""
    content = ("-F", "file=@-;filename=signed.txt")
    url = sandbox.upload_url("signed.txt")
    assert (sandbox.sandbox_id in url) == bool(DOMAIN), url
    assert curl(url, *content, said="words\n")[0] == 200
    assert await done(sandbox.files.read("signed.txt")) == "words\n"
    assert curl(sandbox.download_url("signed.txt")) == (200, "words\n")
    for_root = sandbox.download_url("/home/user/signed.txt", "root", use_signature_expiration=60)
    assert curl(for_root) == (200, "words\n")
    late = sandbox.download_url("signed.txt", use_signature_expiration=-60)
    status, body = curl(late)
    assert status == 401 and "signature is already expired" in body, body
    assert curl(sandbox.download_url("signed.txt").replace("signed.txt", "a"))[0] == 401
    # What is signed for one way is not for the other.
    assert curl(sandbox.download_url("signed.txt"), *content, said="other")[0] == 401


async def ports(sandbox):
    status, body = visit(sandbox, 8000)
    assert status == 502 and "port is not open" in body, body
    await done(sandbox.files.write("/dev/shm/page", "served\n"))
    await serve(sandbox, 8000)
    assert visit(sandbox, 8000, "/page") == (200, "served\n")


async def watch(sandbox):
    await done(sandbox.files.make_dir("watched"))
    events = []
    if KIND is AsyncSandbox:
        handle = await sandbox.files.watch_dir("watched", events.append, recursive=True)
    else:
        handle = sandbox.files.watch_dir("watched", recursive=True)
    await done(sandbox.files.write("watched/one", "1"))

    async def seen():
        if KIND is not AsyncSandbox:
            events.extend(handle.get_new_events())
        return len(events) >= 3

    await until(seen, "three events")
    await done(handle.stop())
    assert {each.name for each in events} == {"one"}, events
    kinds = {str(getattr(each.type, "value", each.type)) for each in events}
    assert len(events) == 3 and kinds >= {"create", "write"}, events


async def timeout(sandbox):
    before = (await done(sandbox.get_info())).end_at
    await done(sandbox.set_timeout(600))
    assert (await done(sandbox.get_info())).end_at > before
    await done(sandbox.set_timeout(240))


async def pause(sandbox):
    await done(sandbox.commands.run("echo kept > /dev/shm/memory"))
    boot_id = await says(sandbox, "cat /proc/sys/kernel/random/boot_id")
    await sleep(sandbox)
    assert not await done(sandbox.is_running())
    woken = await done(KIND.connect(sandbox.sandbox_id, timeout=240))
    assert woken.sandbox_id == sandbox.sandbox_id
    assert await says(woken, "cat /dev/shm/memory") == "kept\n"
    assert await says(woken, "cat /proc/sys/kernel/random/boot_id") == boot_id
    # Who has it from before goes on with it.
    assert await says(sandbox, "echo on") == "on\n"


async def wake(_):
    """One that is paused at its end, and woken by whoever wants something of it."""
    lifecycle = {"on_timeout": "pause", "auto_resume": True}
    sandbox = await done(KIND.create(timeout=240, lifecycle=lifecycle))
    await done(sandbox.files.write("/dev/shm/page", "kept\n"))
    await serve(sandbox, 8000)
    await sleep(sandbox)
    assert await says(sandbox, "cat /dev/shm/page") == "kept\n"
    assert await state(sandbox) == "running"
    await sleep(sandbox)
    assert visit(sandbox, 8000, "/page") == (200, "kept\n")
    assert await state(sandbox) == "running"
    await done(sandbox.set_timeout(0))

    async def asleep():
        return await state(sandbox) == "paused"

    await until(asleep, "the pause at its end")
    assert await done(sandbox.files.read("/dev/shm/page")) == "kept\n"
    assert await done(sandbox.kill()) is True


async def fork(sandbox):
    children = await done(sandbox.fork(count=2, timeout=120))
    assert len(children) == 2
    for child in children:
        assert not isinstance(child, Exception), child
        assert await says(child, "cat /dev/shm/memory") == "kept\n"
        await done(child.kill())
    assert await says(sandbox, "echo on") == "on\n"


async def snapshot(sandbox):
    made = await done(sandbox.create_snapshot())
    listed = await done(KIND.list_snapshots(sandbox_id=sandbox.sandbox_id).next_items())
    assert [each.snapshot_id for each in listed] == [made.snapshot_id]
    other = await done(KIND.create(made.snapshot_id, timeout=60))
    assert await says(other, "cat /dev/shm/memory") == "kept\n"
    assert await done(KIND.delete_snapshot(made.snapshot_id)) is True
    assert await done(KIND.delete_snapshot(made.snapshot_id)) is False
    assert await says(other, "echo on") == "on\n"
    await done(other.kill())


async def paging(sandbox):
    second = await done(KIND.create(timeout=60, metadata={**LABELS, "n": "2"}))
    found, pages = [], 0
    paginator = KIND.list(limit=1, query=SandboxQuery(metadata={"run": RUN}))
    while paginator.has_next:
        found += await done(paginator.next_items())
        pages += 1
    assert [each.sandbox_id for each in found] == [second.sandbox_id, sandbox.sandbox_id]
    assert pages == 2
    states = [e2b.SandboxState.PAUSED]
    asleep = KIND.list(query=SandboxQuery(state=states, metadata=LABELS))
    assert await done(asleep.next_items()) == []
    await done(second.kill())


async def metrics(sandbox):
    (point, *_) = await until(sandbox.get_metrics, "metrics")
    assert point.cpu_count == 1 and point.mem_total == 512 << 20, point
    assert 0 < point.mem_used < point.mem_total, point
    assert 0 <= point.cpu_used_pct <= 100 and 0 < point.disk_used < point.disk_total, point


async def network(sandbox):
    await done(sandbox.update_network({"allow_internet_access": False}))
    await done(sandbox.update_network({"deny_out": ["192.0.2.0/24"]}))


async def kill(sandbox):
    assert await done(sandbox.kill()) is True
    assert await done(sandbox.kill()) is False
    assert not await done(sandbox.is_running())
    gone = getattr(e2b, "SandboxNotFoundException", e2b.NotFoundException)
    await fails((gone, e2b.NotFoundException), sandbox.get_info)
    await fails(e2b.SandboxException, lambda: sandbox.commands.run("true"))
    unknown = await done(KIND.kill("sb" + "0" * 20))
    assert unknown is False


#: With the call, or the word of the package, without which a release has no such step.
STEPS = (
    (run, "commands"),
    (background, "commands"),
    (pty, "pty"),
    (files, "files"),
    (signed, "download_url"),
    (ports, "get_host"),
    (watch, "files"),
    (timeout, "set_timeout"),
    (pause, "connect"),
    (wake, "SandboxLifecycle"),
    (fork, "fork"),
    (snapshot, "create_snapshot"),
    (paging, "list"),
    (metrics, "get_metrics"),
    (network, "update_network"),
    (kill, "kill"),
)


async def main():
    sandbox = await create()
    print("create", flush=True)
    for step, needed in STEPS:
        wanted = step.__name__ in sys.argv[2:] or not sys.argv[2:]
        if wanted and (hasattr(sandbox, needed) or hasattr(e2b, needed)):
            await step(sandbox)
            print(step.__name__, flush=True)


asyncio.run(main())
# The transport of some releases now and then aborts while the interpreter is taken down, when all
# that is looked at is done.
os._exit(0)
