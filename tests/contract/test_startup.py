"""What an image starts in its sandboxes: once for a warm snapshot, else after every boot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from sandmartin.agent.guest import Command, Ended, Output, ProcessEvent, Started
from sandmartin.agent.startup import NotReady
from sandmartin.agent.traits import Ready, Start, Traits
from sandmartin.errors import ToolFailed
from sandmartin.model import SandboxSpec, Shape, State, WarmAhead
from tests.fakes_agent import (
    IMAGE,
    IMAGE_MB,
    Fakes,
    find_leaks,
    make_machine,
    make_spec,
)
from tests.fakes_vmm import PLATFORM
from tests.waiting import until

pytestmark = pytest.mark.qemu_img

PORT = 8080
START = Start(command="serve", user="user", cwd="/srv", envs={"COLOUR": "sand"})
SERVING = Traits(start=START, ready=Ready(port=PORT, deadline_s=10))


@dataclass
class Service:
    """What is started in guests; each start of it takes a moment until it answers."""

    fakes: Fakes
    exit_code: int | None = None
    checks: list[int] = field(default_factory=list)
    started: list[Command] = field(default_factory=list)
    checked: list[Command] = field(default_factory=list)

    async def run(self, command: Command) -> AsyncGenerator[ProcessEvent, None]:
        yield Started(7)
        if command.cmd != "/bin/sh":
            yield Ended(exit_code=0)
            return
        if command.args[-1] == "check":
            self.checked.append(command)
            yield Ended(exit_code=self.checks.pop(0))
            return
        self.started.append(command)
        yield Output(b"beginning\n")
        if self.exit_code is not None:
            yield Ended(exit_code=self.exit_code)
            return
        self.fakes.guests.answers[PORT] = 503
        await asyncio.sleep(0.01)
        self.fakes.guests.answers[PORT] = 200
        # It goes on.
        await asyncio.Event().wait()


def serving(directory: Path, traits: Traits = SERVING, **settings: object) -> Service:
    """A machine whose image starts something."""
    fakes = make_machine(directory, **settings)  # type: ignore[arg-type]
    traits.write(directory / "data/images" / IMAGE / "rootfs.ext4")
    service = Service(fakes)
    fakes.guests.running = service.run
    return service


async def test_started_once_for_all_that_are_restored(directory: Path) -> None:
    service = serving(directory, warm=True)
    fakes = service.fakes
    async with fakes.host() as host:
        tokens = set()
        for number in range(3):
            sandbox = await host.create(make_spec(f"sb{number}"), {"A": str(number)})
            assert sandbox.state is State.RUNNING
            known = fakes.guests.memory(sandbox.host_ip)
            assert (known["id"], known["envs"]) == (f"sb{number}", {"A": str(number)})
            tokens.add(known["token"])
        assert (fakes.vmm.booted, fakes.vmm.restored) == (1, 3)
        # Each has its own, and none that of the snapshot.
        assert len(tokens) == 3
        (warm,) = (directory / "assets/warm").glob("[!.]*")
        kept = fakes.machine.storage.snapshots.read(warm).manifest
        assert kept.token and kept.token not in tokens
        assert kept.envs == {}
        (command,) = service.started
        assert (command.user, command.cwd, command.envs) == ("user", "/srv", {"COLOUR": "sand"})
        assert (command.args, command.tag, command.timeout_s) == (("-c", "serve"), "start", None)
        await host.terminate()


async def test_started_before_a_cold_create_answers(directory: Path) -> None:
    service = serving(directory)
    async with service.fakes.host() as host:
        for number in range(2):
            service.fakes.guests.answers.clear()
            await host.create(make_spec(f"sb{number}"), {})
            assert service.fakes.guests.answers[PORT] == 200
            assert len(service.started) == number + 1
        await host.terminate()


@pytest.mark.parametrize("warm", [False, True])
async def test_what_fails_is_told_once_and_leaves_nothing(directory: Path, warm: bool) -> None:
    service = serving(directory, warm=warm)
    service.exit_code = 3
    async with service.fakes.host() as host:
        with pytest.raises(ToolFailed, match="exited 3; it said: 'beginning'"):
            await host.create(make_spec(), {})
        assert service.fakes.vmm.booted == 1
        assert host.sandboxes() == []
        assert not find_leaks(directory)
        await host.terminate()


async def test_one_that_is_never_ready_is_given_up(directory: Path) -> None:
    never = replace(SERVING, ready=Ready(port=PORT + 1, deadline_s=0.05))
    service = serving(directory, never, warm=True)
    async with service.fakes.host() as host:
        with pytest.raises(NotReady, match=r"not ready within 0\.05 s; it said: 'beginning'"):
            await host.create(make_spec(), {})
        assert not find_leaks(directory)
        await host.terminate()


async def test_ready_by_a_command(directory: Path) -> None:
    service = serving(directory, Traits(start=START, ready=Ready(command="check")))
    service.checks = [1, 1, 0]
    async with service.fakes.host() as host:
        await host.create(make_spec(), {})
        assert service.checks == []
        assert {(each.user, each.cwd) for each in service.checked} == {("user", "/srv")}
        await host.terminate()


async def test_ready_without_anything_started(directory: Path) -> None:
    service = serving(directory, Traits(ready=Ready(command="check")))
    service.checks = [1, 0]
    async with service.fakes.host() as host:
        await host.create(make_spec(), {})
        assert (service.checks, service.started) == ([], [])
        assert {each.user for each in service.checked} == {"root"}
        await host.terminate()


async def test_one_that_ends_well_has_left_something_behind(directory: Path) -> None:
    service = serving(directory, Traits(start=START))
    service.exit_code = 0
    async with service.fakes.host() as host:
        assert (await host.create(make_spec(), {})).state is State.RUNNING
        await host.terminate()


async def test_started_anew_when_the_memory_is_lost(directory: Path) -> None:
    service = serving(directory)
    async with service.fakes.host() as host:
        await host.create(make_spec(), {})
        await host.pause("sb1")
        await host.resume("sb1", None)
        assert len(service.started) == 1
        await host.pause("sb1")
    other = serving(directory, platform=replace(PLATFORM, vmm_version="fake 2"))
    async with other.fakes.host() as host:
        # Its files are there even where that fails.
        other.exit_code = 1
        assert (await host.resume("sb1", None)).state is State.RUNNING
        assert len(other.started) == 1
        await host.terminate()


async def test_other_traits_make_another_warm_snapshot(directory: Path) -> None:
    service = serving(directory, warm=True)
    async with service.fakes.host() as host:
        await host.create(make_spec("sb1"), {})
        changed = replace(SERVING, start=replace(START, envs={"COLOUR": "red"}))
        changed.write(directory / "data/images" / IMAGE / "rootfs.ext4")
        await host.create(make_spec("sb2"), {})
        assert [each.envs["COLOUR"] for each in service.started] == ["sand", "red"]
        await host.terminate()


@pytest.mark.root
async def test_image_of_a_disk_starts_what_its_origin_does(directory: Path) -> None:
    service = serving(directory)
    async with service.fakes.host() as host:
        await host.create(make_spec(), {})
        await host.flatten("sb1", "flat")
        (flat,) = (each for each in host.templates() if each.path.parent.name == "flat")
        assert Traits.of(flat.path) == SERVING
        await host.create(replace(make_spec("sb2"), template="flat"), {})
        assert len(service.started) == 2
        await host.terminate()


async def test_recommended_shape_is_taken_where_none_is_given(directory: Path) -> None:
    traits = replace(SERVING, vcpus=1, memory_mb=256)
    ahead = (WarmAhead(template=IMAGE),)
    service = serving(directory, traits, warm=True, warm_ahead=ahead, ready_sandboxes=f"{IMAGE}=1")
    async with service.fakes.host() as host:
        assert host.default_shape(IMAGE) == Shape(vcpus=1, memory_mb=256)
        spec = SandboxSpec(sandbox_id="sb1", template=IMAGE, memory_mb=256, disk_size_mb=IMAGE_MB)
        await until(lambda: len(host._ready) == 1, "one is ready")
        (ready,) = host._ready.all()
        assert ready.entry.spec.memory_mb == 256
        await host.create(spec, {})
        assert len(service.started) == 1
        await host.terminate()
