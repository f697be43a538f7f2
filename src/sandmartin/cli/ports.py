"""`sandmartin url`: where a port of a sandbox can be reached."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import aclosing
from typing import Any

from sandmartin.cli.connection import add_id, connected, place_of
from sandmartin.cli.options import add_json_flag, add_place_flags, port_number
from sandmartin.cli.talk import print_json
from sandmartin.client.ports import name_of
from sandmartin.errors import Conflict
from sandmartin.model import check_name
from sandmartin.transport.api import Api
from sandmartin.transport.fields import text


def configure(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "url",
        help="print the address of a port of a sandbox",
        description="Print the URL at which a port of a sandbox is reached: a name below the "
        "control plane's, or, without one, the sandbox's address on this machine.",
    )
    add_id(parser)
    parser.add_argument("port", type=port_number, metavar="PORT")
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_url)


def _url(args: argparse.Namespace) -> int:
    sandbox_id = check_name(args.id, "sandbox id")
    url = asyncio.run(_find(args, sandbox_id))
    if args.json:
        print_json({"sandbox_id": sandbox_id, "port": args.port, "url": url})
    else:
        print(url)
    return 0


async def _find(args: argparse.Namespace, sandbox_id: str) -> str:
    place = place_of(args)
    if place.socket is None:
        async with aclosing(Api(place.url, place.api_key)) as api:
            found = await api.ask("GET", f"/v1/sandboxes/{sandbox_id}")
            return name_of(api.url, text(found, "domain"), text(found, "id"), args.port)
    async with connected(args) as transport:
        info = await transport.get_sandbox(sandbox_id)
    if not info.address:
        raise Conflict(f"sandbox {sandbox_id} is {info.state} and has no address")
    return f"http://{info.address}:{args.port}"
