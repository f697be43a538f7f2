"""Network policies, by guests that try; most of them are a network stack in place of a VM."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import aclosing, closing, suppress
from dataclasses import replace
from ipaddress import IPv4Network

import dns.message
import pytest

from sandmartin.agent.claims import Claims
from sandmartin.agent.network import Network, rules
from sandmartin.agent.network.slot import GATEWAY_IP, Slot
from sandmartin.agent.tasks import Tasks
from sandmartin.client.sandbox import AsyncSandbox
from sandmartin.errors import NotFound, ToolFailed
from sandmartin.model import INTERNET, NetworkPolicy, Settings, new_sandbox_id
from sandmartin.transport import Command, NewSandbox, Started, Stdout
from tests import world
from tests.vm.conftest import RunningAgent
from tests.vm.test_network import connect, make_network, nft

PUBLIC, OTHER, PRIVATE = world.PUBLIC_SERVER, world.OTHER_SERVER, world.PRIVATE_SERVER
ALL = "0.0.0.0/0"
NOTHING = NetworkPolicy(deny_out=(ALL,))
_INSTANCE = "tstpol"
_DEADLINE_S = 10.0


class Place:
    """A slot of a network of its own, and a guest in it."""

    def __init__(self, network: Network, slot: Slot) -> None:
        self.network, self.slot = network, slot
        self.guest = world.Guest(slot)

    async def apply(self, policy: NetworkPolicy) -> None:
        await self.network.apply(self.slot, policy)

    async def dial(self, address: str) -> socket.socket:
        """A connection from the guest to an echo. Raises OSError when it is refused."""
        dialling = self.guest.socket(socket.SOCK_STREAM)
        try:
            async with asyncio.timeout(_DEADLINE_S):
                await asyncio.get_running_loop().sock_connect(dialling, (address, world.ECHO_PORT))
        except BaseException:
            dialling.close()
            raise
        return dialling

    async def reaches(self, address: str) -> bool:
        """Whether the guest gets through by TCP; the same must hold for UDP."""
        try:
            with closing(await self.dial(address)) as connection:
                by_tcp = await echoes(connection)
        except OSError as error:
            assert error.errno in {errno.EHOSTUNREACH, errno.EACCES}, error
            by_tcp = False
        assert await self._reaches_by_udp(address) is by_tcp
        return by_tcp

    async def _reaches_by_udp(self, address: str) -> bool:
        with closing(self.guest.socket(socket.SOCK_DGRAM)) as asking:
            asking.connect((address, world.UDP_PORT))
            return await echoes(asking)

    async def resolve(self, name: str) -> list[str]:
        """The addresses of a name, as the guest's resolver says."""
        query, loop = dns.message.make_query(name, "A"), asyncio.get_running_loop()
        with closing(self.guest.socket(socket.SOCK_DGRAM)) as asking:
            asking.connect((str(GATEWAY_IP), 53))
            await loop.sock_sendall(asking, query.to_wire())
            async with asyncio.timeout(_DEADLINE_S):
                answer = dns.message.from_wire(await loop.sock_recv(asking, 4096))
        return [each.address for rrset in answer.answer for each in rrset]


async def echoes(connection: socket.socket) -> bool:
    """Whether what is sent comes back; False when the other end or a rule says no."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_DEADLINE_S):
            await loop.sock_sendall(connection, b"are you there")
            return await loop.sock_recv(connection, 100) == b"are you there"
    except OSError as error:
        assert not isinstance(error, TimeoutError), "neither answered nor refused"
        return False


@pytest.fixture(scope="module")
async def own_settings(settings: Settings) -> Settings:
    """Beside the module's agent, and without its claims."""
    return replace(
        settings,
        run_dir=settings.run_dir.with_name("policies"),
        address_range=IPv4Network("10.21.0.0/24"),
        link_range=IPv4Network("10.22.0.0/23"),
    )


@pytest.fixture(scope="module")
async def network(own_settings: Settings, internet: world.Internet) -> AsyncIterator[Network]:
    network = await make_network(own_settings, _INSTANCE)
    yield network
    await network.destroy_all()


@pytest.fixture
async def place(network: Network) -> AsyncIterator[Place]:
    place = Place(network, await network.acquire())
    place.guest.open()
    yield place
    place.guest.close()
    await network.release(place.slot.number)
    await asyncio.gather(*network._cleaning)


async def test_by_address(place: Place) -> None:
    assert await place.reaches(PUBLIC) and await place.reaches(OTHER)
    for policy, reached in (
        (NetworkPolicy(deny_out=(PUBLIC,)), {OTHER}),
        (NetworkPolicy(deny_out=("203.0.113.128/25",)), {PUBLIC}),
        (NetworkPolicy(deny_out=(ALL,), allow_out=(OTHER,)), {OTHER}),
        (NetworkPolicy(deny_out=("203.0.113.0/24",), allow_out=("203.0.113.0/25",)), {PUBLIC}),
        (NetworkPolicy(allow_internet_access=False), set()),
        (NetworkPolicy(allow_internet_access=False, allow_out=(PUBLIC,)), {PUBLIC}),
        (NetworkPolicy(deny_out=(ALL, PUBLIC, "203.0.113.0/24")), set()),
        (INTERNET, {PUBLIC, OTHER}),
    ):
        await place.apply(policy)
        assert {each for each in (PUBLIC, OTHER) if await place.reaches(each)} == reached, policy


async def test_what_no_sandbox_may_reach_stays_out_of_reach(
    place: Place, internet: world.Internet
) -> None:
    never = (*world.SERVERS[1:], world.HOST_PRIVATE, str(place.slot.link_host_ip))
    internet.names["inside.example."] = PRIVATE
    for policy in (
        NetworkPolicy(allow_out=(ALL,)),
        NetworkPolicy(allow_out=never, deny_out=(ALL,)),
        NetworkPolicy(allow_out=("inside.example", "10.0.0.0/8"), deny_out=(ALL,)),
    ):
        await place.apply(policy)
        # An allowed name that leads inside opens nothing either.
        assert await place.resolve("inside.example") == [PRIVATE]
        for address in (*never, PRIVATE):
            with pytest.raises(OSError):
                (await place.dial(address)).close()


async def test_by_name(place: Place, internet: world.Internet) -> None:
    unfit = ("other.example", "files.example", "api.example.com", r"x\.files.example")
    for name in ("api.example", "a.b.files.example", *unfit):
        internet.names[f"{name}."] = OTHER
    await place.apply(NetworkPolicy(deny_out=(ALL,), allow_out=("API.example.", "*.files.example")))
    # Another name for the same address, and the name above those that are allowed, open nothing.
    for name in unfit:
        assert await place.resolve(name) == [OTHER]
        assert not await place.reaches(OTHER), name
    assert await place.resolve("api.EXAMPLE") == [OTHER]
    assert await place.reaches(OTHER) and not await place.reaches(PUBLIC)
    await place.apply(NetworkPolicy(deny_out=(ALL,), allow_out=("*.files.example",)))
    assert not await place.reaches(OTHER)
    await place.resolve("a.b.files.example")
    assert await place.reaches(OTHER)
    # What the guest knows already counts for a policy that comes later.
    await place.apply(NOTHING)
    assert not await place.reaches(OTHER)
    await place.apply(NetworkPolicy(deny_out=(ALL,), allow_out=("api.example",)))
    assert await place.reaches(OTHER)


async def test_names_are_resolved_where_nothing_else_is_reached(
    place: Place, internet: world.Internet
) -> None:
    await place.apply(NetworkPolicy(allow_internet_access=False))
    assert await place.resolve("still.example") == [PUBLIC]


async def test_a_change_is_one_for_open_flows_too(place: Place) -> None:
    denied, allowed = await place.dial(PUBLIC), await place.dial(OTHER)
    asking = place.guest.socket(socket.SOCK_DGRAM)
    asking.connect((PUBLIC, world.UDP_PORT))
    with closing(denied), closing(allowed), closing(asking):
        for flow in (denied, allowed, asking):
            assert await echoes(flow)
        await place.apply(NetworkPolicy(deny_out=(PUBLIC,)))
        assert not await echoes(denied)
        assert not await echoes(asking)
        assert await echoes(allowed)
        # An end by the rules is one for good; a datagram's flow has none.
        await place.apply(INTERNET)
        with pytest.raises(OSError):
            denied.send(b"x")
        assert await echoes(asking) and await echoes(allowed)


async def test_nothing_comes_in_either_once_a_flow_is_denied(
    place: Place, internet: world.Internet
) -> None:
    """A guest that only listens hears no more, and what it says in return goes nowhere."""
    loop, server = asyncio.get_running_loop(), world.on_internet(socket.SOCK_DGRAM, PUBLIC, 0)
    asking = place.guest.socket(socket.SOCK_DGRAM)
    with closing(server), closing(asking):
        # It takes what comes from anywhere: the slot may have changed whom it is from.
        await loop.sock_sendto(asking, b"begin", server.getsockname())
        _, address = await loop.sock_recvfrom(server, 100)
        await loop.sock_sendto(server, b"go on", address)
        assert await loop.sock_recv(asking, 100) == b"go on"
        await place.apply(NOTHING)
        await loop.sock_sendto(server, b"more", address)
        # Nor where the slot has forgotten the flow, and the host has not.
        inside = ["nsenter", f"--net={place.slot.netns_path}", "conntrack", "-F"]
        subprocess.run(inside, check=True, capture_output=True)
        await loop.sock_sendto(server, b"once more", address)
        with suppress(OSError):
            await loop.sock_sendto(asking, b"leak", server.getsockname())
        # On another way in than the one that is closed, so what was sent before is through.
        await place.apply(NetworkPolicy(deny_out=(ALL,), allow_out=(OTHER,)))
        assert await place.reaches(OTHER)
        for end in (server, asking):
            # A refusal that was told counts for nothing here.
            end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            with pytest.raises(BlockingIOError):
                end.recv(100)


async def test_a_flow_by_name_outlives_the_answer(place: Place, internet: world.Internet) -> None:
    internet.names["api.example."] = OTHER
    policy = NetworkPolicy(deny_out=(ALL,), allow_out=("api.example",))
    await place.apply(policy)
    await place.resolve("api.example")
    with closing(await place.dial(OTHER)) as flow:
        nft(place.slot, "flush", "set", "inet", "sandmartin", "named")
        assert not await place.reaches(OTHER)
        assert await echoes(flow)
        # A change that still allows it leaves it alone.
        await place.apply(NetworkPolicy(deny_out=(ALL,), allow_out=("api.example", PUBLIC)))
        assert await echoes(flow)
        await place.apply(NOTHING)
        assert not await echoes(flow)


async def test_the_host_reaches_a_guest_whatever_its_policy(place: Place) -> None:
    await place.apply(NOTHING)
    loop, listening = asyncio.get_running_loop(), place.guest.socket(socket.SOCK_STREAM)
    with closing(listening):
        listening.bind(("0.0.0.0", 7000))
        listening.listen()
        reader, writer = await asyncio.open_connection(str(place.slot.host_ip), 7000)
        accepted, _ = await loop.sock_accept(listening)
        with closing(accepted):
            await place.apply(NetworkPolicy(allow_internet_access=False))
            await loop.sock_sendall(accepted, b"hello")
            assert await reader.readexactly(5) == b"hello"
        writer.close()


async def test_a_slot_that_goes_back_has_the_default_again(
    network: Network, place: Place, internet: world.Internet
) -> None:
    internet.names["api.example."] = OTHER
    await place.apply(NetworkPolicy(deny_out=(ALL,), allow_out=("api.example",)))
    await place.resolve("api.example")
    await network.release(place.slot.number)
    await asyncio.gather(*network._cleaning)
    assert await rules.are_of(place.slot, INTERNET)
    # Nor is anything known of the guest before.
    await place.apply(NetworkPolicy(deny_out=(ALL,), allow_out=("api.example",)))
    assert not await place.reaches(OTHER)


async def test_rules_that_cannot_be_loaded_leave_all_as_it_was(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.apply(NetworkPolicy(deny_out=(PUBLIC,)))
    whole = rules.slot_rules
    with monkeypatch.context() as patched:
        patched.setattr(rules, "slot_rules", lambda *words: whole(*words) + "no rule\n")
        with pytest.raises(ToolFailed):
            await place.apply(INTERNET)
    assert not await place.reaches(PUBLIC) and await place.reaches(OTHER)


async def test_an_address_that_could_not_be_added_is_added_when_it_is_told_again(
    place: Place, internet: world.Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    internet.names["api.example."] = OTHER
    await place.apply(NetworkPolicy(deny_out=(ALL,), allow_out=("api.example",)))
    with monkeypatch.context() as patched:
        patched.setattr(rules, "named_elements", lambda *_: "no rule\n")
        # The guest is answered all the same.
        assert await place.resolve("api.example") == [OTHER]
        assert not await place.reaches(OTHER)
    await place.resolve("api.example")
    assert await place.reaches(OTHER)


async def test_the_next_agent_keeps_the_rules_and_what_flows(
    own_settings: Settings, network: Network, place: Place, internet: world.Internet
) -> None:
    internet.names["api.example."] = OTHER
    policy = NetworkPolicy(deny_out=(ALL,), allow_out=("api.example",))
    await place.apply(policy)
    await place.resolve("api.example")
    with closing(await place.dial(OTHER)) as flow:
        await network._stop_listening(place.slot.number)
        data_dir = own_settings.data_dir.with_name(_INSTANCE)
        claims = Claims(own_settings.run_dir, _INSTANCE, data_dir)
        second = Network(own_settings, claims, Tasks())
        await second._listen(place.slot)
        try:
            # Before it knows of the policy, it is asked for a name.
            nft(place.slot, "flush", "set", "inet", "sandmartin", "named")
            await place.resolve("api.example")
            assert not await place.reaches(OTHER)
            await second.keep(place.slot, policy)
            assert await place.reaches(OTHER) and await echoes(flow)
            # What the journal says counts, also where the rules were not changed in time.
            await second.keep(place.slot, NOTHING)
            assert not await echoes(flow)
        finally:
            await second._stop_listening(place.slot.number)
            await network._listen(place.slot)


async def test_addresses_of_names_are_bounded(
    place: Place, internet: world.Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandmartin.agent.network.reach.MAX_TOLD", 4)
    await place.apply(NetworkPolicy(deny_out=(ALL,), allow_out=("*.example",)))
    for number in range(9):
        internet.names[f"n{number}.example."] = f"203.0.113.{50 + number}"
        await place.resolve(f"n{number}.example")
    listed = nft(place.slot, "list", "set", "inet", "sandmartin", "named")
    there = [number for number in range(9) if f"203.0.113.{50 + number} " in listed]
    assert there == [5, 6, 7, 8]


# On VMs.


async def test_a_policy_stays_through_all_of_a_sandboxs_life(
    agent: RunningAgent, internet: world.Internet
) -> None:
    """Create, pause and resume, checkpoint and rollback, fork, template, the next policy."""
    transport = agent.transport
    targets = [f"{each}:{world.TCP_PORT}" for each in (PUBLIC, OTHER)]
    policy = NetworkPolicy(deny_out=(PUBLIC,))
    made: list[str] = []

    async def reached(sandbox: AsyncSandbox) -> list[bool]:
        return [
            each == world.BANNER.decode() for each in (await connect(sandbox, *targets)).values()
        ]

    async def policies() -> dict[str, NetworkPolicy]:
        return {each.sandbox_id: each.network for each in await transport.list_sandboxes()}

    async with agent.sandbox(memory_mb=256, network=policy) as sandbox:
        sandbox_id = sandbox.sandbox_id
        try:
            assert await reached(sandbox) == [False, True]
            checkpoint = await transport.create_checkpoint(sandbox_id, "")
            await transport.pause(sandbox_id)
            await transport.resume(sandbox_id, None)
            assert await reached(sandbox) == [False, True]
            made += [new_sandbox_id() for _ in range(2)]
            (child,) = await transport.fork(sandbox_id, (made[0],), 0)
            assert child.error is None
            await transport.create_snapshot(sandbox_id, "restricted", live=True)
            await transport.create(NewSandbox(sandbox_id=made[1], template="restricted"))
            for each in made:
                assert await reached(AsyncSandbox(transport, each)) == [False, True]
            # What it may reach now counts, not what it might when the checkpoint was made.
            await transport.pause(sandbox_id)
            later = NetworkPolicy(deny_out=(OTHER,))
            await transport.update_network(sandbox_id, later)
            await transport.rollback(sandbox_id, checkpoint.checkpoint_id)
            assert await reached(sandbox) == [True, False]
            await transport.update_network(sandbox_id, NOTHING)
            assert await reached(sandbox) == [False, False]
            assert await policies() == {sandbox_id: NOTHING, **dict.fromkeys(made, policy)}
        finally:
            for each in made:
                await transport.destroy(each)
            with suppress(NotFound):
                await transport.delete_snapshot("restricted")


#: Says what it hears back, for as long as there is somebody.
_TALK = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20)
try:
    for line in sys.stdin.buffer:
        connection.sendall(line)
        print(connection.recv(100).decode(), end="", flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""


async def test_a_change_ends_what_a_vm_has_open(
    agent: RunningAgent, sandbox: AsyncSandbox, internet: world.Internet
) -> None:
    internet.names["api.example."] = OTHER
    words = ("-c", _TALK, "api.example", str(world.ECHO_PORT))
    command = Command(cmd="python3", args=words, stdin=True, timeout_s=60)
    lines: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def said() -> AsyncIterator[bytes]:
        while (line := await lines.get()) is not None:
            yield line

    events = agent.transport.exec_stream(sandbox.sandbox_id, command)
    async with aclosing(events), asyncio.timeout(60), asyncio.TaskGroup() as group:
        started = await anext(events)
        assert isinstance(started, Started)
        pid = started.pid
        group.create_task(agent.transport.send_stdin(sandbox.sandbox_id, pid, said()))

        async def answer(line: bytes) -> bytes:
            lines.put_nowait(line)
            heard = b""
            while not heard.endswith(b"\n"):
                event = await anext(events)
                assert isinstance(event, Stdout), event
                heard += event.data
            return heard

        assert await answer(b"one\n") == b"one\n"
        by_name = NetworkPolicy(allow_internet_access=False, allow_out=("api.example",))
        await agent.transport.update_network(sandbox.sandbox_id, by_name)
        assert await answer(b"two\n") == b"two\n"
        await agent.transport.update_network(sandbox.sandbox_id, NOTHING)
        assert await answer(b"three\n") == b"ConnectionResetError\n"
        lines.put_nowait(None)
    await agent.transport.update_network(sandbox.sandbox_id, INTERNET)
