"""`/v1/sandboxes/{id}/files`: the files of a sandbox. Content of any size passes in pieces."""

from __future__ import annotations

import posixpath
import stat
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from sandmartin.control.api.bodies import (
    BINARY,
    RAW_BODY,
    Streamed,
    begun,
    kept_as,
    pieces_of,
    read_form,
)
from sandmartin.control.api.inside import Inside, TheInside
from sandmartin.errors import Invalid
from sandmartin.transport import FileInfo

router = APIRouter(tags=["files"])

_MAX_PATH = 4096
_MAX_USER = 256
_KINDS = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK}
_CONTENT = {200: {"content": BINARY, "description": "The content."}}
_TAR = {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}
_TREE = {200: {"content": _TAR, "description": "A plain tar."}}
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["path", "file"],
                    "properties": {
                        "path": {"type": "string"},
                        "user": {"type": "string"},
                        "file": {"type": "string", "format": "binary"},
                    },
                }
            }
        },
    }
}

ThePath = Annotated[str, Query(min_length=1, max_length=_MAX_PATH)]
TheUser = Annotated[str, Query(max_length=_MAX_USER, description="Empty is root.")]
TheOwner = Annotated[
    str,
    Query(
        max_length=2 * _MAX_USER,
        description="`user`, `user:group` or numbers; empty keeps the numbers of the tar.",
    ),
]


class _Named(BaseModel):
    model_config = ConfigDict(extra="forbid")

    user: str = Field("", max_length=_MAX_USER, description="Name or number; empty is root.")


class FileName(_Named):
    path: str = Field(min_length=1, max_length=_MAX_PATH)


class Listing(FileName):
    depth: int = Field(1, ge=1, le=64, description="Levels below the directory.")


class Move(_Named):
    source: str = Field(min_length=1, max_length=_MAX_PATH)
    destination: str = Field(min_length=1, max_length=_MAX_PATH)


class EntryBody(BaseModel):
    """A file, in the words of the sandbox."""

    name: str
    path: str
    type: str = Field(description="`file`, `directory`, `symlink` or `other`.")
    size: int
    mode: int
    permissions: str = Field(description="As `ls` writes them.")
    owner: str
    group: str
    modified_at: int = Field(description="Seconds since the epoch.")
    symlink_target: str = Field(description="Empty for all but a symbolic link.")

    @classmethod
    def of(cls, found: FileInfo) -> EntryBody:
        return cls(
            name=found.name,
            path=found.path,
            type=found.type,
            size=found.size_bytes,
            mode=found.mode,
            permissions=stat.filemode(_KINDS.get(found.type, 0) | (found.mode & 0o7777)),
            owner=found.owner,
            group=found.group,
            modified_at=found.modified_at,
            symlink_target=found.symlink_target,
        )


class Entries(BaseModel):
    entries: list[EntryBody]


class Unpacked(BaseModel):
    members: int = Field(description="How many the tar had.")


def _done() -> Response:
    return Response(status_code=204)


# Content.


@router.put("/{sandbox_id}/files", status_code=204, openapi_extra=RAW_BODY)
async def put(request: Request, inside: TheInside, path: ThePath, user: TheUser = "") -> Response:
    """Write a file of any size, which is the body, and the directories above it."""
    await inside.agent.write_file(inside.sandbox_id, path, pieces_of(request), user)
    return _done()


@router.post("/{sandbox_id}/files/write", status_code=204, openapi_extra=_FORM)
@router.post("/{sandbox_id}/files/stream/write", status_code=204, openapi_extra=_FORM)
async def write(request: Request, inside: TheInside) -> Response:
    """Write a file of any size: a form whose field `path` comes before its part `file`."""
    form = await read_form(request)
    if not form.fields.get("path"):
        raise Invalid("no path comes before the file", hint="send `path`, then `file`")
    path, user = form.fields["path"], form.fields.get("user", "")
    await inside.agent.write_file(inside.sandbox_id, path, form.pieces, user)
    return _done()


async def _content(inside: Inside, path: str, user: str) -> Response:
    pieces = await begun(inside.agent.read_file(inside.sandbox_id, path, user))
    return Streamed(pieces, headers=kept_as(posixpath.basename(path)))


@router.get("/{sandbox_id}/files", response_class=Response, responses=_CONTENT)  # type: ignore[arg-type]
async def get(inside: TheInside, path: ThePath, user: TheUser = "") -> Response:
    """A file's content, of any size."""
    return await _content(inside, path, user)


@router.post("/{sandbox_id}/files/read", response_class=Response, responses=_CONTENT)  # type: ignore[arg-type]
@router.post("/{sandbox_id}/files/stream/read", response_class=Response, responses=_CONTENT)  # type: ignore[arg-type]
async def read(body: FileName, inside: TheInside) -> Response:
    """A file's content, of any size."""
    return await _content(inside, body.path, body.user)


# Directories.


@router.put("/{sandbox_id}/files/tree", openapi_extra=RAW_BODY)
async def put_tree(
    request: Request, inside: TheInside, path: ThePath, owner: TheOwner = ""
) -> Unpacked:
    """Unpack a plain tar, which is the body, below a directory, which is made if it is missing.

    It is done with root's rights. What was unpacked before an error stays.
    """
    pieces = pieces_of(request)
    members = await inside.agent.write_tree(inside.sandbox_id, path, pieces, owner=owner)
    return Unpacked(members=members)


@router.get("/{sandbox_id}/files/tree", response_class=Response, responses=_TREE)  # type: ignore[arg-type]
async def get_tree(inside: TheInside, path: ThePath) -> Response:
    """A file, a link or a whole directory as a plain tar, read with root's rights.

    Names are relative to the directory above. An answer that is cut is no whole tree.
    """
    pieces = await begun(inside.agent.read_tree(inside.sandbox_id, path))
    name = posixpath.basename(path.rstrip("/")) or inside.sandbox_id
    return Streamed(pieces, media_type="application/x-tar", headers=kept_as(f"{name}.tar"))


@router.post("/{sandbox_id}/files/list")
async def list_files(body: Listing, inside: TheInside) -> Entries:
    """What is in a directory."""
    found = await inside.agent.list_files(inside.sandbox_id, body.path, body.user, depth=body.depth)
    return Entries(entries=[EntryBody.of(each) for each in found])


@router.post("/{sandbox_id}/files/stat")
async def stat_file(body: FileName, inside: TheInside) -> EntryBody:
    return EntryBody.of(await inside.agent.stat_file(inside.sandbox_id, body.path, body.user))


@router.post("/{sandbox_id}/files/mkdir", status_code=204)
async def make_directory(body: FileName, inside: TheInside) -> Response:
    """Make a directory and its missing parents; one that is there already is a conflict."""
    await inside.agent.make_directory(inside.sandbox_id, body.path, body.user)
    return _done()


@router.post("/{sandbox_id}/files/remove", status_code=204)
async def remove(body: FileName, inside: TheInside) -> Response:
    """Remove a file or a whole tree; one that is not there is no error."""
    await inside.agent.remove_file(inside.sandbox_id, body.path, body.user)
    return _done()


@router.post("/{sandbox_id}/files/move", status_code=204)
async def move(body: Move, inside: TheInside) -> Response:
    await inside.agent.move_file(inside.sandbox_id, body.source, body.destination, body.user)
    return _done()
