"""Files of E2B's builds: sent to an address that needs no key, as it says itself for what it is.

In the address is a sealed note: the team, the hash that the client chose for the files, and until
when it holds.
"""

from __future__ import annotations

import binascii
import re
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.api.bodies import RAW_BODY, pieces_of
from sandmartin.control.caller import system
from sandmartin.control.e2b import bodies
from sandmartin.control.e2b.names import TheName
from sandmartin.control.seal import Sealer
from sandmartin.errors import Denied, Invalid, NotFound, Unauthenticated

router = APIRouter()

LIFE_S = 3600.0
_PURPOSE = "e2b files"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,1000}")
TheHash = Annotated[str, Path(max_length=128, description="As the client has it.")]


@dataclass(frozen=True)
class Ticket:
    """Who may send which files, until when."""

    team_id: str
    files_hash: str
    #: Seconds since the epoch.
    expires_at: float

    def sealed(self, sealer: Sealer) -> str:
        """The ticket as a word of an address."""
        note = [_PURPOSE, self.team_id, self.files_hash, self.expires_at]
        return sealer.seal(note).decode().rstrip("=")

    @classmethod
    def unsealed(cls, sealer: Sealer, word: str) -> Ticket:
        """Raises Unauthenticated, Denied."""
        try:
            if not _TOKEN.fullmatch(word):
                raise Invalid("the ticket is none")
            note = sealer.unseal((word + "=" * (-len(word) % 4)).encode())
        except (Invalid, binascii.Error) as error:
            raise Unauthenticated("the address of the upload is not ours") from error
        if not isinstance(note, list) or note[:1] != [_PURPOSE]:
            raise Unauthenticated("the address of the upload is not ours")
        ticket = cls(*note[1:])
        if ticket.expires_at < time.time():
            raise Denied("the address of the upload is too old", hint="begin the build again")
        return ticket


@router.get("/templates/{name}/files/{digest}", status_code=201)
async def place(
    name: TheName, digest: TheHash, request: Request, caller: TheCaller, platform: ThePlatform
) -> bodies.FileUpload:
    """Where to send the files of a step, and whether they are there already."""
    if not (await platform.builds.list(caller, name=name, limit=1)).rows:
        raise NotFound(f"template {name!r} has no build", hint="reserve one first")
    ticket = Ticket(caller.team_id, digest, time.time() + LIFE_S)
    base = platform.settings.public_url.rstrip("/") or str(request.base_url).rstrip("/")
    return bodies.FileUpload(
        present=await platform.builds.contexts.has_files(caller, digest),
        url=f"{base}/templates/uploads/{ticket.sealed(platform.sealer)}",
    )


@router.put("/templates/uploads/{ticket}", status_code=201, openapi_extra=RAW_BODY)
async def upload(ticket: str, request: Request, platform: ThePlatform) -> Response:
    """Keep the files of a step: a tar, which may be gzipped."""
    held = Ticket.unsealed(platform.sealer, ticket)
    contexts = platform.builds.contexts
    await contexts.put_files(system(held.team_id), held.files_hash, pieces_of(request))
    return Response(status_code=201)
