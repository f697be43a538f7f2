"""What sandboxes start from."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from sandmartin.client.connection import connection_to
from sandmartin.client.files import Content, pieces_of
from sandmartin.transport import Snapshot, Template
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

    async def list(self) -> tuple[Template, ...]:
        """The team's own, and the platform's."""
        return await connection_to(self._place).transport.list_templates()

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
