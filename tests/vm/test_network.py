"""What a sandbox reaches, what it does not, and who reaches it; each by somebody who tries."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Network

import pytest

from sandmartin.agent.claims import Claims
from sandmartin.agent.journal import INSTANCE
from sandmartin.agent.network import Network, rules
from sandmartin.agent.network.slot import Slot
from sandmartin.agent.tasks import Tasks
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.errors import Exhausted
from sandmartin.model import Settings
from tests import leaks, world
from tests.vm.conftest import RunningAgent, execute

#: Tries each target by TCP and tells what came of it.
_CONNECT = """
import errno, json, socket, sys
results = {}
for target in sys.argv[1:]:
    address, port = target.rsplit(":", 1)
    try:
        with socket.create_connection((address, int(port)), timeout=3) as connection:
            results[target] = connection.recv(100).decode() if port == "8080" else "open"
    except TimeoutError:
        results[target] = "timeout"
    except OSError as error:
        results[target] = errno.errorcode.get(error.errno, str(error))
print(json.dumps(results))
"""
_REFUSED = {"EHOSTUNREACH", "EACCES", "ECONNREFUSED", "ENETUNREACH", "timeout"}


async def connect(sandbox: AsyncSandbox, *targets: str) -> dict[str, str]:
    result = await execute(sandbox, "python3", "-c", _CONNECT, *targets)
    assert result.exit_code == 0, result
    answers: dict[str, str] = json.loads(result.text)
    return answers


@pytest.fixture(scope="module", autouse=True)
def lone_host(private_host: None) -> Iterator[None]:
    """Before the module's agent, which is to find a host that forwards nothing."""
    with world.forwarding_nothing():
        yield


@pytest.fixture(scope="module")
async def second(agent: RunningAgent) -> AsyncIterator[AsyncSandbox]:
    """Another sandbox of the same agent."""
    async with agent.sandbox() as sandbox:
        yield sandbox


async def test_the_internet_is_reached_and_sees_the_host(
    sandbox: AsyncSandbox, internet: world.Internet
) -> None:
    target = f"{world.PUBLIC_SERVER}:{world.TCP_PORT}"
    assert (await connect(sandbox, target))[target] == world.BANNER.decode()
    assert internet.connections[-1] == world.HOST_PUBLIC


async def test_what_is_not_the_internet_is_refused(
    agent: RunningAgent, sandbox: AsyncSandbox, second: AsyncSandbox, internet: world.Internet
) -> None:
    other = agent.host_ip(second.sandbox_id)
    listener = socket.create_server(("0.0.0.0", world.TCP_PORT))
    targets = [
        f"{address}:{world.TCP_PORT}"
        for address in (
            *world.SERVERS[1:],
            world.HOST_PUBLIC,
            world.HOST_PRIVATE,
            str(agent.settings.link_range[2]),
            "169.254.0.22",
        )
    ]
    targets += [f"{other}:49983", f"{world.HOST_PUBLIC}:22", "169.254.0.22:49983"]
    seen = len(internet.connections)
    with listener:
        answers = await connect(sandbox, *targets)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert not set(answers.values()) - _REFUSED, answers
    assert len(internet.connections) == seen
    # A refusal is told at once, where nothing forbids to answer.
    assert answers[f"{world.PRIVATE_SERVER}:{world.TCP_PORT}"] != "timeout"


async def test_a_foreign_source_address_gets_nowhere(
    sandbox: AsyncSandbox, internet: world.Internet
) -> None:
    seen = len(internet.datagrams)
    script = f"""
ip addr add 203.0.113.99/32 dev lo
python3 -c '
import socket
for source in ("203.0.113.99", "169.254.0.21"):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind((source, 0))
    s.sendto(source.encode(), ("{world.PUBLIC_SERVER}", {world.UDP_PORT}))
s.settimeout(5)
print(s.recv(100).decode())'
ip addr del 203.0.113.99/32 dev lo
"""
    result = await execute(sandbox, "sh", "-ec", script)
    assert result.text == "169.254.0.21\n", result
    assert [data for data, _ in internet.datagrams[seen:]] == [b"169.254.0.21"]


async def test_names_are_resolved_by_way_of_the_gateway(
    sandbox: AsyncSandbox, internet: world.Internet
) -> None:
    script = """
import socket
print(open("/etc/resolv.conf").read().strip())
print(socket.gethostbyname("example.com"))
print(len(socket.gethostbyname_ex("big.example.com")[2]))
"""
    result = await execute(sandbox, "python3", "-c", script)
    assert result.exit_code == 0, result
    assert result.text.splitlines() == ["nameserver 169.254.0.22", world.PUBLIC_SERVER, "150"]
    assert "big.example.com. tcp" in internet.queries


async def test_a_flood_of_queries_is_limited(
    sandbox: AsyncSandbox, internet: world.Internet
) -> None:
    script = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for i in range(3000):
    query = i.to_bytes(2, "big") + b"\\1\\0\\0\\1" + bytes(6) + b"\\1a\\0\\0\\1\\0\\1"
    s.sendto(query, ("169.254.0.22", 53))
"""
    before = len(internet.queries)
    assert (await execute(sandbox, "python3", "-c", script)).exit_code == 0
    result = await execute(sandbox, "getent", "ahostsv4", "after.example.com", timeout_s=30)
    # It may take a retry, but the resolver goes on serving.
    assert world.PUBLIC_SERVER in result.text
    assert len(internet.queries) - before < 1500


async def test_there_is_no_ipv6(sandbox: AsyncSandbox) -> None:
    script = """
ip -6 addr show scope global
sysctl -w net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.eth0.disable_ipv6=0 >&2
ip addr add fd00::21/64 dev eth0
ip -6 route add default via fd00::1 dev eth0
python3 -c '
import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_STREAM); s.settimeout(2)
try:
    s.connect(("2001:db8::1", 80)); print("reached")
except OSError as error:
    print("refused")'
"""
    result = await execute(sandbox, "sh", "-c", script)
    assert result.text == "refused\n", result


async def test_the_outside_does_not_reach_a_sandbox(
    agent: RunningAgent, sandbox: AsyncSandbox
) -> None:
    address = agent.host_ip(sandbox.sandbox_id)
    _, writer = await asyncio.open_connection(address, 49983)
    writer.close()
    outside = world.on_internet(socket.SOCK_STREAM, world.ROUTER, 0)
    with outside, pytest.raises(TimeoutError):
        async with asyncio.timeout(2):
            await asyncio.get_running_loop().sock_connect(outside, (address, 49983))


async def test_the_host_forwards_for_sandboxes_alone(agent: RunningAgent) -> None:
    assert world.setting("ipv4/ip_forward") == "0"
    assert world.setting("ipv4/conf/wan0/forwarding") == "1"
    assert world.setting("ipv4/conf/lan0/forwarding") == "0"
    # From the Internet to what lies behind the host: nothing answers, and nothing is sent on.
    rules_now = subprocess.run(
        ["nft", "list", "table", "inet", rules.host_table(agent.instance_id)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'iifname "wan0" oifname != "sm*" drop' in rules_now.stdout


async def test_every_slot_is_alike_inside(
    agent: RunningAgent, sandbox: AsyncSandbox, second: AsyncSandbox
) -> None:
    script = "ip -br -4 addr show eth0; ip -br link show eth0; ip neigh show 169.254.0.22"
    both = [(await execute(each, "sh", "-c", script)).text for each in (sandbox, second)]
    assert both[0].split()[:3] == both[1].split()[:3] == ["eth0", "UP", "169.254.0.21/30"]
    for text in both:
        assert "02:fc:00:00:00:01 PERMANENT" in text and "02:fc:00:00:00:02" in text
    assert agent.host_ip(sandbox.sandbox_id) != agent.host_ip(second.sandbox_id)
    for each in (sandbox, second):
        # Whatever the guest said at its tap.
        command = ["nsenter", f"--net={agent.netns(each.sandbox_id)}", "ip", "neigh"]
        known = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "169.254.0.21 dev tap0 lladdr 02:fc:00:00:00:02 PERMANENT" in known


# The slots themselves, without VMs.


@pytest.fixture
def own_settings(settings: Settings) -> Settings:
    """Settings of a second agent on the same machine."""
    return replace(settings, data_dir=settings.data_dir.with_name("other"), slot_pool_size=1)


async def make_network(settings: Settings, instance_id: str) -> Network:
    data_dir = settings.data_dir.with_name(instance_id)
    data_dir.mkdir(exist_ok=True)
    (data_dir / INSTANCE).write_text(json.dumps({"id": instance_id}))
    network = Network(settings, Claims(settings.run_dir, instance_id, data_dir), Tasks())
    await network.start([])
    return network


async def test_slots_are_unique_on_the_machine_and_come_back_clean(
    agent: RunningAgent, own_settings: Settings
) -> None:
    mine, other = (
        await make_network(own_settings, "tstaaa"),
        await make_network(own_settings, "tstbbb"),
    )
    try:
        slots = [await network.acquire() for network in (mine, mine, other)]
        assert len({slot.number for slot in slots}) == 3
        assert len({slot.host_ip for slot in slots}) == 3
        slot = slots[0]
        await leave_traces(slot)
        await mine.release(slot.number)
        await mine.release(slot.number)
        # It is cleaned behind our back, and nobody's until then.
        await asyncio.gather(*mine._cleaning)
        again = [await mine.acquire() for _ in range(2)]
        assert slot in again
        assert not flows(slot)
        table = nft(slot, "list", "table", "inet", "sandmartin")
        assert "1.2.3.4" not in table
    finally:
        await mine.destroy_all()
        await other.destroy_all()
    for instance in ("tstaaa", "tstbbb"):
        left = await asyncio.to_thread(
            leaks.find_all, instance, own_settings.data_dir, own_settings.run_dir
        )
        assert not {each for each in left if not each.startswith("slot claim")}
    # The module's agent still needs it.
    assert world.setting("ipv4/conf/wan0/forwarding") == "1"


async def leave_traces(slot: Slot) -> None:
    """A rule and a flow, as a sandbox may leave them."""
    nft(slot, "add", "element", "inet", "sandmartin", "denied", "{ 1.2.3.4 }")
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    probe.sendto(b"x", (str(slot.host_ip), 7))
    probe.close()
    assert flows(slot)


def flows(slot: Slot) -> str:
    """The connections that the kernel knows of a slot, inside and on the host."""
    inside = ["nsenter", f"--net={slot.netns_path}"]
    return _conntrack(*inside) + "".join(
        line for line in _conntrack().splitlines() if f"={slot.host_ip} " in line
    )


def _conntrack(*prefix: str) -> str:
    # A listing that another change interrupts fails, and is to be asked for again.
    for _ in range(50):
        done = subprocess.run([*prefix, "conntrack", "-L"], capture_output=True, text=True)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done
    return done.stdout


def nft(slot: Slot, *words: str) -> str:
    command = ["nsenter", f"--net={slot.netns_path}", "nft", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


async def test_what_a_killed_agent_left_is_removed_at_the_next_start(
    agent: RunningAgent, own_settings: Settings
) -> None:
    killed = await make_network(own_settings, "tstccc")
    used, kept = await killed.acquire(), await killed.acquire()
    assert used.exists() and kept.exists()
    # No close: it is as if the process had ended here.
    next_one = Network(
        own_settings, Claims(own_settings.run_dir, "tstccc", own_settings.data_dir), Tasks()
    )
    with suppress(OSError):
        await killed._stop_listening(kept.number)
    await next_one.start([kept.number])
    try:
        assert next_one.adopted(kept.number) == kept
        assert next_one.adopted(used.number) is None
        assert not used.exists()
    finally:
        await killed.close()
        await next_one.destroy_all()


async def test_a_full_range_is_told(agent: RunningAgent, own_settings: Settings) -> None:
    tiny = replace(
        own_settings,
        address_range=IPv4Network("10.21.0.0/30"),
        link_range=IPv4Network("10.22.0.0/29"),
        run_dir=own_settings.run_dir.with_name("tiny"),
        slot_pool_size=0,
    )
    network = await make_network(tiny, "tstddd")
    try:
        await network.acquire()
        await network.acquire()
        with pytest.raises(Exhausted, match="slots"):
            await network.acquire()
    finally:
        await network.destroy_all()
