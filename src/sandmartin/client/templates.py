"""What sandboxes start from."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from sandmartin.client.builds import Terms, building, finished
from sandmartin.client.callbacks import OnEach
from sandmartin.client.connection import connection_to
from sandmartin.client.files import Content, pieces_of
from sandmartin.client.template import Template
from sandmartin.transport import Snapshot, TemplateInfo
from sandmartin.transport.builds import Build, BuildLog, Builds, Tag
from sandmartin.transport.place import find_place


class AsyncTemplates:
    """The templates of a place.

        templates = AsyncTemplates()
        print([each.name for each in await templates.list()])

    `url` and `api_key` are as in `AsyncSandbox.create`.
    """

    def __init__(self, *, url: str | None = None, api_key: str | None = None) -> None:
        self._place = find_place(url, api_key)

    def __repr__(self) -> str:
        return f"AsyncTemplates({self._place})"

    async def list(self) -> tuple[TemplateInfo, ...]:
        """The team's own, and the platform's."""
        return await connection_to(self._place).transport.list_templates()

    async def build(
        self,
        template: Template,
        *,
        name: str,
        tags: Sequence[str] = (),
        arguments: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
        vcpus: int | None = None,
        memory_mb: int | None = None,
        disk_size_mb: int | None = None,
        no_cache: bool = False,
        on_log: OnEach[BuildLog] | None = None,
    ) -> Build:
        """Build a template and wait until it is ready.

            app = Template.from_dockerfile("app/Dockerfile")
            await templates.build(app, name="app", tags=["v1"], on_log=print)

        `name` is `NAME` or `NAME:TAG`, `tags` are further ones; they move to what is built.
        `arguments` are for the ARGs of a Dockerfile, `secrets`, by their ids, for its RUNs.
        `memory_mb` and `disk_size_mb` are in MiB.

        Raises Invalid, which says where in the source; BuildFailed; NotFound, Exhausted; and
        Unimplemented without a control plane. One that is interrupted is cancelled.
        """
        terms = Terms(
            name=name,
            tags=tuple(tags),
            arguments=dict(arguments or {}),
            secrets=dict(secrets or {}),
            vcpus=vcpus,
            memory_mb=memory_mb,
            disk_size_mb=disk_size_mb,
            no_cache=no_cache,
        )
        builds = self._builds
        async with building(builds, template, terms) as begun:
            return await finished(builds, begun, on_log)

    async def builds(self, *, limit: int = 100) -> tuple[Build, ...]:
        """The team's newest builds, the newest first."""
        return await self._builds.list(limit)

    async def get_build(self, build_id: str) -> Build:
        """How a build is. Raises NotFound."""
        return await self._builds.get(build_id)

    async def build_log(
        self, build_id: str, *, follow: bool = False
    ) -> AsyncGenerator[BuildLog, None]:
        """The log of a build by now, or with `follow` to its end. Raises NotFound."""
        log = self._builds.follow if follow else self._builds.log
        async with aclosing(log(build_id)) as entries:
            async for entry in entries:
                yield entry

    async def cancel_build(self, build_id: str) -> Build:
        """End a build; one that is over stays as it is. Raises NotFound."""
        return await self._builds.cancel(build_id)

    async def tags(self, name: str) -> tuple[Tag, ...]:
        """The tags of a template. Raises NotFound."""
        return await self._builds.tags(name)

    async def tag(self, target: str, *tags: str) -> None:
        """Let `tags` name what `target`, `NAME` or `NAME:TAG`, names. Raises NotFound, Invalid."""
        for tag in tags:
            await self._builds.assign_tag(target, tag)

    async def untag(self, name: str, *tags: str) -> None:
        """Take tags off a template; what had no other is deleted. Raises NotFound."""
        for tag in tags:
            await self._builds.remove_tag(name, tag)

    @property
    def _builds(self) -> Builds:
        return connection_to(self._place).server("a build").builds

    async def from_snapshot(self, sandbox_id: str, name: str, *, live: bool = True) -> Snapshot:
        """Make a template of a sandbox, which goes on if `live`, and is paused if not.

        Raises NotFound, Conflict, AlreadyExists, DiskFull.
        """
        transport = connection_to(self._place).transport
        return await transport.create_snapshot(sandbox_id, name, live=live)

    async def delete(self, name: str) -> None:
        """Delete a template. Raises NotFound, and Conflict while something depends on it."""
        await connection_to(self._place).transport.delete_snapshot(name)

    async def download(self, name: str) -> AsyncGenerator[bytes, None]:
        """A whole template as one archive (a sparse tar), in chunks.

            with open("base.tar", "wb") as file:
                async for chunk in templates.download("base"):
                    file.write(chunk)

        That of a snapshot holds its memory, and whatever secrets were in it. Raises NotFound.
        """
        transport = connection_to(self._place).transport
        async with aclosing(transport.read_template(name)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def upload(self, name: str, content: Content) -> None:
        """Make a template of such an archive, whole or not at all.

            with open("base.tar", "rb") as file:
                await templates.upload("mine", file)

        An image may come from anywhere; a snapshot only from where it was made. Raises Invalid,
        AlreadyExists, Denied, Exhausted; Conflict when it cannot run there.
        """
        async with aclosing(pieces_of(content)) as pieces:
            await connection_to(self._place).transport.write_template(name, pieces)
