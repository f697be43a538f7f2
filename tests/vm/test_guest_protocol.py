"""The guest's protocol on a real VM: its kernel, its disk and its users."""

from __future__ import annotations

import base64
from typing import Any

import httpx

from sandmartin.client.sandbox import AsyncSandbox
from tests.contract.guests import stream
from tests.vm.conftest import RunningAgent, execute

FILE = "/home/user/made/file"
BYTES = {"Content-Type": "application/octet-stream"}


def client(agent: RunningAgent, sandbox: AsyncSandbox) -> httpx.Client:
    address = agent.host_ip(sandbox.sandbox_id)
    headers = {"X-Access-Token": agent.token(sandbox.sandbox_id)}
    url = f"http://{address}:49983"
    return httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False)


async def test_a_tree_is_watched_and_metadata_is_kept(
    agent: RunningAgent, sandbox: AsyncSandbox
) -> None:
    with client(agent, sandbox) as guest:

        def call(method: str, **message: Any) -> Any:
            return guest.post(f"/filesystem.Filesystem/{method}", json=message).json()

        def events() -> list[tuple[str, str]]:
            told = call("GetWatcherEvents", watcherId=watcher)["events"]
            return [(each["type"].removeprefix("EVENT_TYPE_"), each["name"]) for each in told]

        # Relative to the home of the user that nobody had to name.
        watcher = call("CreateWatcher", path=".", recursive=True)["watcherId"]
        assert "entry" in call("MakeDir", path="made")
        assert events() == [("CREATE", "made")]
        told = guest.post(
            "/files",
            params={"path": "made/file"},
            files={"file": ("x", b"content")},
            headers={"X-Metadata-Author": "ann"},
        ).json()
        kept = {"author": "ann"}
        assert told == [{"path": FILE, "name": "file", "type": "file", "metadata": kept}]
        three = [(kind, "made/file") for kind in ("CREATE", "CHMOD", "WRITE")]
        assert events() == three
        entry = call("Stat", path=FILE)["entry"]
        shown = entry["owner"], entry["group"], entry["permissions"], entry["metadata"]
        assert shown == ("user", "user", "-rw-r--r--", kept)
        await execute(sandbox, "rm", "-r", "/home/user/made")
        assert events() == [("REMOVE", "made/file"), ("REMOVE", "made")]
        assert call("CreateWatcher", path="/root")["code"] == "permission_denied"
        assert call("RemoveWatcher", watcherId=watcher) == {}


async def test_the_default_user_may_become_root(agent: RunningAgent, sandbox: AsyncSandbox) -> None:
    with client(agent, sandbox) as guest:
        script = "id -un; pwd; sudo -n id -un; echo $SHELL"
        process = {"cmd": "/bin/bash", "args": ["-l", "-c", script]}
        told = stream(guest, "process.Process/Start", {"process": process})
        outputs = [each["event"]["data"] for each in told[1:-2]]
        output = b"".join(base64.b64decode(each.get("stdout", "")) for each in outputs)
        assert output.decode().split() == ["user", "/home/user", "root", "/bin/bash"]
    (info,) = await agent.transport.list_sandboxes()
    assert info.envd_version == "0.6.13"


async def test_the_way_of_the_proxy_writes_where_root_may(
    agent: RunningAgent, sandbox: AsyncSandbox
) -> None:
    """As clients of E2B's expect; the guest's own door, and what others lead, does not."""
    target = {"path": "/app/made/file"}
    with client(agent, sandbox) as guest:
        assert guest.post("/files", params=target, content=b"x", headers=BYTES).status_code == 403
    transport = httpx.AsyncHTTPTransport(uds=str(agent.settings.socket))
    url = f"http://agent/sandbox/{sandbox.sandbox_id}/49983"
    async with httpx.AsyncClient(transport=transport, base_url=url, timeout=30) as proxied:
        await execute(sandbox, "ln", "-s", "/etc", "/app-link")
        for path, status in (("/app/made/file", 200), ("/app-link/file", 403)):
            wanted = {"path": path}
            answer = await proxied.post("/files", params=wanted, content=b"x", headers=BYTES)
            assert answer.status_code == status, answer.text
        asked = await proxied.post("/filesystem.Filesystem/MakeDir", json={"path": "/code/deep"})
        made = asked.json()
        assert (made["entry"]["owner"], made["entry"]["group"]) == ("user", "user")
    shown = await execute(sandbox, "stat", "-c", "%U:%G", "/app", "/app/made/file", "/code")
    assert shown.text.split() == ["user:user"] * 3
