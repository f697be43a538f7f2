"""Building templates: `template build`, and what became of builds: `builds|logs|cancel|tag`."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from contextlib import AsyncExitStack, ExitStack, aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sandmartin.cli import exitcode
from sandmartin.cli.build_log import BuildLogText, excerpt
from sandmartin.cli.connection import ask_control_plane, control_plane, do_each
from sandmartin.cli.files import local_errors
from sandmartin.cli.interrupts import Interrupts, carry_out
from sandmartin.cli.options import (
    add_debug_flag,
    add_json_flag,
    add_server_flag,
    check_utf8,
    pairs_of,
    positive,
)
from sandmartin.cli.progress import Progress
from sandmartin.cli.talk import moment, print_json, print_table, say
from sandmartin.client.builds import Terms, building, finished
from sandmartin.client.callbacks import OnEach
from sandmartin.client.template import Template, is_dockerfile
from sandmartin.errors import Invalid, SandmartinError
from sandmartin.model import check_tag, split_tag
from sandmartin.transport.api import Api
from sandmartin.transport.builds import Build, BuildLog, Builds, Script, Tag

#: Name of the variable that holds it.
_PASSWORD = "SANDMARTIN_REGISTRY_PASSWORD"  # noqa: S105
_DESCRIPTION = f"""\
Build a template of a Dockerfile, of a recipe, of an image or of a template, and print its name.
The log goes to standard error as it comes. Ctrl-C cancels the build.

A file whose first instruction is FROM or ARG is a Dockerfile, any other a recipe. --from names
what a recipe starts from (default: the template base), or without --file is the template. What
has a slash is an image: docker.io/library/debian:12. A registry's password is read from
{_PASSWORD}.
"""
_NOT_OF_NAMES = re.compile(r"[^a-z0-9._-]+")


def configure_build(nouns: Any) -> None:
    parser: argparse.ArgumentParser = nouns.add_parser(
        "build",
        help="build a template",
        description=_DESCRIPTION,
        epilog=exitcode.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("context", nargs="?", default=".", metavar="CONTEXT", help="directory of the files")
    add("-f", "--file", metavar="FILE", help="Dockerfile or recipe (default: CONTEXT/Dockerfile)")
    add("--name", metavar="NAME[:TAG]", help="default: the context's name")
    add("--tag", action="append", default=[], metavar="TAG", help="a further tag; repeatable")
    add("--from", dest="ground", metavar="TEMPLATE|IMAGE", help="what it starts from")
    add("--oci-archive", metavar="FILE", help="start from an OCI or docker archive")
    add("--registry-user", metavar="NAME", help="with whose password images are pulled")
    for flag, metavar, what in (
        ("--build-arg", "NAME=VALUE", "value of an ARG; repeatable"),
        ("--secret", "id=NAME,src=FILE|env=VAR", "for RUNs; repeatable"),
    ):
        add(flag, action="append", default=[], metavar=metavar, help=what)
    add("--vcpus", type=positive, metavar="N", help="virtual CPUs")
    add("--memory", type=positive, metavar="MB", help="memory in MiB")
    add("--disk", type=positive, metavar="MB", help="size of the root disk in MiB")
    add("--no-cache", action="store_true", help="do every step anew")
    _add_common_flags(parser)
    parser.set_defaults(act=_build)


def configure_others(nouns: Any) -> None:
    listing = nouns.add_parser("builds", help="list builds", description="List the newest builds.")
    listing.add_argument(
        "-n", "--limit", type=positive, default=20, metavar="N", help="default: 20"
    )
    listing.set_defaults(act=_list)
    logs = nouns.add_parser(
        "logs", help="print the log of a build", description="Print the log of a build."
    )
    logs.add_argument("id", metavar="ID")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the build is over")
    logs.set_defaults(act=_logs)
    cancel = nouns.add_parser("cancel", help="end builds", description="End builds.")
    cancel.add_argument("ids", nargs="+", metavar="ID")
    cancel.set_defaults(act=_cancel)
    tag = nouns.add_parser(
        "tag",
        help="give a template tags, or take them off",
        description="Let tags name what TARGET names; without tags, list those of a template.",
    )
    tag.add_argument("target", metavar="NAME[:TAG]")
    tag.add_argument("tags", nargs="*", metavar="TAG")
    tag.add_argument("--rm", action="store_true", help="take the tags off the template NAME")
    tag.set_defaults(act=_tag)
    for parser in (listing, logs, cancel, tag):
        _add_common_flags(parser)


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    add_server_flag(parser)
    add_debug_flag(parser)
    add_json_flag(parser)


# Building.


def _build(args: argparse.Namespace) -> int:
    template, terms = template_of(args), terms_of(args)

    async def act(stack: AsyncExitStack, _: Interrupts) -> int:
        builds = Builds(await stack.enter_async_context(control_plane(args)))
        upload = _Upload(stack)
        build = await stack.enter_async_context(building(builds, template, terms, upload))
        upload.end()
        say(f"build {build.build_id} of {terms.name}")
        done = await finished(builds, build, _teller(builds, build))
        _tell_end(done)
        if args.json:
            print_json(asdict(done))
        else:
            print(terms.name)
        return 0

    try:
        return asyncio.run(carry_out(act))
    except SandmartinError as error:
        for line in excerpt(template, error.message):
            say(line)
        raise


def _teller(builds: Builds, build: Build) -> OnEach[BuildLog]:
    """What writes the log to standard error."""
    text = BuildLogText(sys.stderr, build.steps_total)

    async def tell(entry: BuildLog) -> None:
        # How many steps there are is known once the first has begun.
        if entry.step and not text.steps:
            text.steps = (await builds.get(build.build_id)).steps_total
        text(entry)

    return tell


def _tell_end(build: Build) -> None:
    took_s = max(0.0, build.finished_at - build.created_at)
    cached = f", {build.steps_cached} of them cached" if build.steps_cached else ""
    say(f"ready after {took_s:.1f} s: {build.steps_done} steps{cached}")


class _Upload:
    """The progress of what is sent, one thing after the other."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._progress = Progress()
        self._shown = stack.enter_context(ExitStack())
        self._name = ""

    def __call__(self, name: str, size_bytes: int, count: int) -> None:
        if name != self._name:
            self.end()
            self._name = name
            self._shown.enter_context(self._progress.of(f"sending {name}", size_bytes))
        self._progress.add(count)

    def end(self) -> None:
        self._shown.close()


def template_of(args: argparse.Namespace) -> Template:
    """What `args` ask to be built. Raises Invalid."""
    if args.oci_archive and (args.file or args.ground):
        args.parser.error("--oci-archive is built as it is, without --file or --from")
    registry = _registry(args)
    if args.oci_archive:
        return Template.from_archive(args.oci_archive, context=args.context)
    if args.ground and not args.file:
        if "/" in args.ground:
            return Template.from_image(args.ground, **registry)
        split_tag(args.ground)
        return Template.from_template(args.ground)
    path = Path(args.file) if args.file else Path(args.context) / "Dockerfile"
    as_dockerfile = Template.from_dockerfile(path, context=args.context, **registry)
    assert isinstance(as_dockerfile.source, Script)
    if is_dockerfile(as_dockerfile.source.text):
        if args.ground:
            args.parser.error(f"{path} is a Dockerfile, whose FROM says what it starts from")
        return as_dockerfile
    return _recipe(args, path)


def _recipe(args: argparse.Namespace, path: Path) -> Template:
    if args.ground and "/" in args.ground:
        return Template.from_recipe(
            path, image=args.ground, context=args.context, **_registry(args)
        )
    ground = args.ground or "base"
    split_tag(ground)
    return Template.from_recipe(path, template=ground, context=args.context)


def _registry(args: argparse.Namespace) -> dict[str, str]:
    if not args.registry_user:
        return {}
    password = os.environ.get(_PASSWORD, "")
    if not password:
        raise Invalid(f"there is no password for {args.registry_user}", hint=f"set {_PASSWORD}")
    return {"username": args.registry_user, "password": password}


def terms_of(args: argparse.Namespace) -> Terms:
    """What `args` give the build beside the template. Raises Invalid."""
    check_utf8(*args.build_arg, *args.tag)
    name = args.name or _name_of(Path(args.context))
    split_tag(name)
    return Terms(
        name=name,
        tags=tuple(check_tag(each) for each in args.tag),
        arguments=pairs_of(args.build_arg, "--build-arg"),
        secrets=dict(map(_secret, args.secret)),
        vcpus=args.vcpus,
        memory_mb=args.memory,
        disk_size_mb=args.disk,
        no_cache=args.no_cache,
    )


def _name_of(context: Path) -> str:
    name = _NOT_OF_NAMES.sub("-", context.resolve().name.lower()).strip("-._")[:64]
    if not name:
        raise Invalid("the template has no name", hint="use --name NAME")
    return name


def _secret(text: str) -> tuple[str, str]:
    """Name and value of `id=NAME,src=FILE` or `id=NAME,env=VAR`. Raises Invalid."""
    fields = dict(part.partition("=")[::2] for part in text.split(","))
    name, file, variable = (fields.pop(each, "") for each in ("id", "src", "env"))
    if not name or fields or bool(file) == bool(variable):
        raise Invalid(
            f"--secret {text!r} is not valid", hint="use id=NAME,src=FILE or id=NAME,env=VAR"
        )
    if variable:
        if variable not in os.environ:
            raise Invalid(f"--secret {name} is of {variable}, which is not set")
        return name, os.environ[variable]
    with local_errors(Path(file), "read"):
        try:
            return name, Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise Invalid(f"{file} is no text in UTF-8") from error


# What became of builds.


def _list(args: argparse.Namespace) -> int:
    found = ask_control_plane(args, lambda api: Builds(api).list(args.limit))
    if args.json:
        print_json([asdict(each) for each in found])
    else:
        print_table(("ID", "NAME", "STATE", "STEPS", "CREATED"), map(_row, found))
    return 0


def _row(build: Build) -> tuple[str, ...]:
    steps = f"{build.steps_done}/{build.steps_total}"
    return (build.build_id, build.name, build.state, steps, moment(int(build.created_at)))


def _logs(args: argparse.Namespace) -> int:
    tell = BuildLogText(sys.stdout)

    async def read(api: Api) -> int:
        builds = Builds(api)
        log = builds.follow if args.follow else builds.log
        async with aclosing(log(args.id)) as entries:
            async for entry in entries:
                if args.json:
                    print_json(asdict(entry))
                else:
                    tell(entry)
        build = await builds.get(args.id)
        if build.error is not None and not args.json:
            say(f"{build.state}: {build.error.message}")
        return exitcode.FAILED if args.follow and build.state != "ready" else 0

    return ask_control_plane(args, read)


def _cancel(args: argparse.Namespace) -> int:
    return do_each(
        args,
        control_plane(args),
        args.ids,
        "cancelled",
        lambda api, build_id: Builds(api).cancel(build_id),
    )


def _tag(args: argparse.Namespace) -> int:
    name, _ = split_tag(args.target)
    if args.rm and not args.tags:
        args.parser.error("--rm needs the tags that are to be taken off")

    async def act(api: Api) -> tuple[Tag, ...]:
        builds = Builds(api)
        for each in args.tags:
            if args.rm:
                await builds.remove_tag(name, each)
            else:
                await builds.assign_tag(args.target, each)
        return await builds.tags(name) if not args.rm else ()

    found = ask_control_plane(args, act)
    if args.json:
        print_json([asdict(each) for each in found])
    elif not args.tags:
        rows = ((each.tag, each.template_id, moment(int(each.created_at))) for each in found)
        print_table(("TAG", "TEMPLATE", "CREATED"), rows)
    return 0
