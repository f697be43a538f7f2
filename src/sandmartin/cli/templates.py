"""Templates, and snapshots that become some: `snapshot` and `template ls|rm|pull|push`.

How they are built is in `builds`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sandmartin.cli import builds
from sandmartin.cli.connection import add_id, ask, ask_sandbox, connected, do_each
from sandmartin.cli.files import local_errors
from sandmartin.cli.options import add_json_flag, add_place_flags
from sandmartin.cli.pipes import ByteSource
from sandmartin.cli.progress import Progress
from sandmartin.cli.talk import print_json, print_table
from sandmartin.model import check_name, random_id
from sandmartin.transport import TemplateInfo, Transport

_HEAD = ("NAME", "KIND", "VCPUS", "MEMORY_MB", "DISK_MB", "BYTES")


def configure_snapshot(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "snapshot",
        help="make a template of a sandbox",
        description="Make a template of a sandbox, memory and disk, and print its name. The "
        "sandbox is paused by it, or goes on with --live.",
    )
    add_id(parser)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--live", action="store_true", help="leave the sandbox running")
    add_place_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(act=_snapshot)


def configure_template(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "template",
        help="build, list, delete, fetch and bring templates",
        description="What sandboxes start from.",
    )
    nouns = parser.add_subparsers(dest="template_verb", metavar="VERB", required=True)
    listing = nouns.add_parser("ls", help="list templates", description="List the templates.")
    add_place_flags(listing)
    add_json_flag(listing)
    listing.set_defaults(act=_list)
    removal = nouns.add_parser(
        "rm",
        help="delete templates",
        description="Delete templates. One that something still depends on stays.",
    )
    removal.add_argument("names", nargs="+", metavar="NAME")
    add_place_flags(removal)
    add_json_flag(removal)
    removal.set_defaults(act=_remove)
    builds.configure_build(nouns)
    builds.configure_others(nouns)
    _configure_content(nouns)


def _configure_content(nouns: Any) -> None:
    pull = nouns.add_parser(
        "pull",
        help="fetch a template as a file",
        description="Write a whole template to a file: a tar archive with sparse files. That of a "
        "snapshot holds its memory, and whatever secrets were in it.",
    )
    pull.add_argument("name", metavar="NAME")
    pull.add_argument("-o", "--output", required=True, metavar="FILE", help="where to write it")
    pull.set_defaults(act=_pull)
    push = nouns.add_parser(
        "push",
        help="make a template of such a file",
        description="Make a template of a file that `pull` wrote, or of a tar archive of a raw "
        "ext4 image named rootfs.ext4. A snapshot is taken only where it was made.",
    )
    push.add_argument("file", metavar="FILE")
    push.add_argument("name", metavar="NAME")
    push.set_defaults(act=_push)
    for parser in (pull, push):
        add_place_flags(parser)
        add_json_flag(parser)


def _snapshot(args: argparse.Namespace) -> int:
    name = check_name(args.name, "template name")
    made = ask_sandbox(args, lambda sandbox: sandbox.snapshot(name, live=args.live))
    if args.json:
        print_json(asdict(made))
    else:
        print(made.name)
    return 0


def _list(args: argparse.Namespace) -> int:
    found = ask(args, lambda transport: transport.list_templates())
    if args.json:
        print_json([asdict(each) for each in found])
    else:
        print_table(_HEAD, [_row(each) for each in found])
    return 0


def _row(template: TemplateInfo) -> tuple[str, ...]:
    shape = (template.vcpus, template.memory_mb, template.disk_size_mb)
    numbers = [str(number or "-") for number in shape]
    return (template.name, template.kind, *numbers, str(template.size_bytes))


def _remove(args: argparse.Namespace) -> int:
    names = [check_name(each, "template name") for each in args.names]
    return do_each(
        args,
        connected(args),
        names,
        "removed",
        lambda transport, name: transport.delete_snapshot(name),
    )


def _pull(args: argparse.Namespace) -> int:
    name, target = check_name(args.name, "template name"), Path(args.output)
    # What breaks off leaves the old file, or none.
    beside = target.with_name(f".{target.name}.{random_id(6)}")

    async def act(transport: Transport) -> int:
        count, progress = 0, Progress()
        with local_errors(target, "written"), progress.of(name, 0):
            async with aclosing(transport.read_template(name)) as chunks:
                # What cannot be read makes no file.
                chunk = await anext(chunks, b"")
                try:
                    with beside.open("xb") as file:
                        while chunk:
                            await asyncio.to_thread(file.write, chunk)
                            progress.add(len(chunk))
                            count += len(chunk)
                            chunk = await anext(chunks, b"")
                    await asyncio.to_thread(beside.replace, target)
                finally:
                    beside.unlink(missing_ok=True)
        return count

    count = ask(args, act)
    if args.json:
        print_json({"name": name, "file": args.output, "bytes": count})
    return 0


def _push(args: argparse.Namespace) -> int:
    name, source = check_name(args.name, "template name"), Path(args.file)

    async def act(transport: Transport) -> int:
        count, progress = 0, Progress()

        async def counted(fd: int) -> AsyncGenerator[bytes, None]:
            nonlocal count
            async for chunk in ByteSource(fd):
                yield chunk
                count += len(chunk)
                progress.add(len(chunk))

        with local_errors(source, "read"):
            fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            try:
                with progress.of(args.file, os.fstat(fd).st_size):
                    async with aclosing(counted(fd)) as chunks:
                        await transport.write_template(name, chunks)
            finally:
                os.close(fd)
        return count

    count = ask(args, act)
    if args.json:
        print_json({"name": name, "file": args.file, "bytes": count})
    else:
        print(name)
    return 0
