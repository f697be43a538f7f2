"""What stages start from: templates that are there, and what is brought in to become some.

An image of a registry, and an archive that was uploaded, become a hidden template of the team on
one host, which later builds find again: an archive by its digest, an image by its reference for as
long as that is fresh. One that a password opened is fetched each time; what was built on it is
found again by the digest of its manifest.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from sandmartin.control.builds import plan
from sandmartin.control.builds.actions import Defaults
from sandmartin.control.builds.contexts import Contexts
from sandmartin.control.builds.layers import Layers, layer_key
from sandmartin.control.builds.log import Log
from sandmartin.control.builds.request import NewBuild
from sandmartin.control.caller import system
from sandmartin.control.db import Database
from sandmartin.control.defaults import defaults_from_dict, image_to_dict
from sandmartin.control.hosts import Hosts
from sandmartin.control.scheduler import choose_store
from sandmartin.control.tables import Build, Template
from sandmartin.control.templates import Hidden, Templates, find_template
from sandmartin.errors import Invalid, NotFound, SandmartinError, Unavailable
from sandmartin.model import split_tag
from sandmartin.transport import ImportedImage, ImportProgress, RegistryAuth
from sandmartin.transport.agent import Agent

#: Has an agent make a template of this name.
Bring = Callable[[Agent, str], Awaitable[ImportedImage]]


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a stage starts from."""

    #: Names its content.
    key: str
    defaults: Defaults
    #: None of a stage, before that one is done.
    template: Template | None = None


class Grounds:
    """Finds them, and brings them in."""

    def __init__(
        self,
        db: Database,
        hosts: Hosts,
        templates: Templates,
        layers: Layers,
        contexts: Contexts,
        fresh_s: float,
    ) -> None:
        self._db = db
        self._hosts = hosts
        self._templates = templates
        self._layers = layers
        self._contexts = contexts
        self._fresh_s = fresh_s

    async def prepare(self, row: Build, new: NewBuild, log: Log, ground: plan.Ground) -> Ground:
        """Have a ground that is no stage. Raises NotFound, Invalid, and what a host refused."""
        match ground:
            case plan.Template(name):
                return await self._template(row.team_id, name)
            case plan.Image(reference):
                # A template's name goes first: what is written in full is always an image.
                try:
                    split_tag(reference)
                    return await self._template(row.team_id, reference)
                except (NotFound, Invalid):
                    return await self._image(row, new, log, reference)
            case plan.RootArchive(sha256):
                pieces = self._contexts.pieces(row.team_id, sha256)
                return await self._archive(row, log, f"archive {sha256}", pieces)
            case plan.Scratch():
                return await self._archive(row, log, "scratch", _pieces(_nothing()))
        raise AssertionError(f"{type(ground).__name__} is a stage")

    async def _template(self, team_id: str, name: str) -> Ground:
        async with self._db.read() as session:
            found = await find_template(session, team_id, name, lock=False)
        return Ground(
            key=f"template {found.template_id}",
            defaults=defaults_from_dict(found.defaults),
            template=found,
        )

    async def _image(self, row: Build, new: NewBuild, log: Log, reference: str) -> Ground:
        # Whoever gives a password is to be asked for it by the registry, each time.
        key = "" if new.registry else layer_key("image", reference)
        since = 0.0 if "@sha256:" in reference else time.time() - self._fresh_s
        if key and not new.no_cache:
            found = await self._layers.find(row.team_id, [key], newer_than=since)
            if found is not None:
                await log.say(f"image {reference} is there already")
                return _of_image(found)
        auth = RegistryAuth(*new.registry) if new.registry else None
        await log.say(f"fetching image {reference}")

        async def bring(agent: Agent, name: str) -> ImportedImage:
            async with aclosing(agent.import_image(reference, name, auth)) as events:
                async for event in events:
                    if isinstance(event, ImportProgress):
                        await log.say(event.message)
                    else:
                        return event
            raise Unavailable(f"the import of image {reference} was broken off")

        return _of_image(await self._bring(row, key, bring))

    async def _archive(
        self, row: Build, log: Log, what: str, pieces: AsyncIterator[bytes]
    ) -> Ground:
        key = layer_key(what)
        found = await self._layers.find(row.team_id, [key])
        if found is None:
            await log.say(f"unpacking {what}")

            async def bring(agent: Agent, name: str) -> ImportedImage:
                return await agent.import_archive(name, pieces)

            found = await self._bring(row, key, bring)
        return _of_image(found)

    async def _bring(self, row: Build, key: str, bring: Bring) -> Template:
        """Have a host make a template, and note it. What is cut off leaves nothing."""
        caller = system(row.team_id)
        async with self._db.write() as session:
            host = await choose_store(session)
            hidden = Hidden(build_id=row.build_id, kind="image", layer_key=key)
            made = await self._templates.add_hidden(session, caller, None, hidden)
        agent = await self._hosts.agent(host.host_id)
        try:
            image = await bring(agent, made.agent_name)
            there = {each.name: each for each in await agent.list_templates()}
            found = there.get(made.agent_name)
            if found is None:
                raise Unavailable("the image was lost as soon as it was there")
            async with self._db.write() as session:
                kept = await session.get(Template, made.template_id)
                if kept is None:
                    raise Unavailable("somebody else works on the build")
                kept.disk_size_mb = found.disk_size_mb
                kept.defaults = image_to_dict(image)
                await self._templates.made(
                    session, kept.template_id, host.host_id, found.size_bytes
                )
        except SandmartinError:
            async with self._db.write() as session:
                await self._templates.forget(session, made.template_id)
            await self._templates.end_unknown(agent, made.agent_name)
            raise
        return kept


def _of_image(row: Template) -> Ground:
    return Ground(
        key=f"image {row.defaults['digest']}",
        defaults=defaults_from_dict(row.defaults),
        template=row,
    )


def _nothing() -> bytes:
    """An archive of an image in which there is nothing, as Docker would save it."""
    # A layer without any member is one that tools leave out; what is in here each sandbox has.
    layer = _tar(dict.fromkeys(("dev/", "proc/", "run/", "sys/"), b""))
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest: Any = [{"Config": "config.json", "RepoTags": None, "Layers": ["layer.tar"]}]
    said = {"config.json": config, "manifest.json": manifest}
    files = {name: json.dumps(each).encode() for name, each in said.items()}
    return _tar(files | {"layer.tar": layer})


def _tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            if name.endswith("/"):
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    yield content
