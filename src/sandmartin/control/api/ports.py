"""`/v1/sandboxes/{id}/ports`: what listens in a sandbox, as its kernel tells it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from fastapi import APIRouter
from pydantic import BaseModel, Field

from sandmartin.control.api.inside import Inside, TheInside
from sandmartin.control.listeners import (
    MOST_BYTES,
    MOST_LISTENERS,
    TABLES,
    Listener,
    read_listeners,
)
from sandmartin.errors import NotFound, TimedOut
from sandmartin.relay.target import GUEST_PORT

router = APIRouter(tags=["ports"])
#: For both tables together, which a guest may hand out as slowly as it likes.
_READ_S = 10.0


class PortBody(BaseModel):
    """A TCP port that something in the sandbox listens on."""

    port: int
    address: str = Field(description="What it is bound to; `0.0.0.0` and `::` are all addresses.")
    loopback: bool = Field(
        description="It is bound to the loopback interface; it is reached all the same."
    )

    @classmethod
    def of(cls, listener: Listener) -> PortBody:
        return cls(port=listener.port, address=listener.address, loopback=listener.loopback)


class Ports(BaseModel):
    ports: list[PortBody] = Field(description="By number; one may be bound to several addresses.")


@router.get("/{sandbox_id}/ports")
async def list_ports(inside: TheInside) -> Ports:
    """What listens on TCP now, but for the guest agent."""
    try:
        async with asyncio.timeout(_READ_S):
            found = {
                each for table in TABLES for each in read_listeners(await _read(inside, table))
            }
    except TimeoutError as error:
        raise TimedOut("the sandbox did not tell its ports in time") from error
    listeners = sorted(each for each in found if each.port != GUEST_PORT)
    return Ports(ports=[PortBody.of(each) for each in listeners[:MOST_LISTENERS]])


async def _read(inside: Inside, path: str) -> bytes:
    """The beginning of a table; nothing where the kernel has none, as without IPv6."""
    content = bytearray()
    try:
        async with aclosing(inside.agent.read_file(inside.sandbox_id, path)) as pieces:
            async for piece in pieces:
                content += piece
                if len(content) >= MOST_BYTES:
                    break
    except NotFound:
        return b""
    return bytes(content[:MOST_BYTES])
