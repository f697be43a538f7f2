"""Serves once the default context has run something: whoever finds it there finds it fast."""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from code_interpreter.contexts import Contexts
from code_interpreter.rehearsal import rehearse
from code_interpreter.surroundings import Sandbox
from code_interpreter.web import application

_MAX_BODY_BYTES = 32 << 20


async def serve(args: argparse.Namespace) -> None:
    """Serve until told to end."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    contexts = Contexts(args.home)
    try:
        web = application(contexts, Sandbox(args.envs_url, args.machine_id))
        await rehearse(web, contexts)
        server = HTTPServer(web, max_body_size=_MAX_BODY_BYTES, max_buffer_size=_MAX_BODY_BYTES)
        sockets = bind_sockets(args.port, args.address)
        server.add_sockets(sockets)
        print(f"serving on port {sockets[0].getsockname()[1]}", flush=True)
        await ended.wait()
        server.stop()
    finally:
        await contexts.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="code_interpreter", description=__doc__)
    parser.add_argument("--address", default="0.0.0.0")  # noqa: S104 - the proxy comes from outside
    parser.add_argument("--port", type=int, default=49999)
    parser.add_argument("--home", default="/home/user")
    parser.add_argument("--envs-url", default="http://127.0.0.1:49983/envs")
    parser.add_argument("--machine-id", type=Path, default=Path("/etc/machine-id"))
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
