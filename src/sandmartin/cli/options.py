"""Flags that several verbs share, and how they become Settings."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from sandmartin.cli import exitcode
from sandmartin.errors import Invalid
from sandmartin.model import Accel, Settings

_MAX_PORT = 65535


class Parser(argparse.ArgumentParser):
    """argparse, with the exit code of wrong usage as the verb has it and `hint:` as we have it.

    Flags are not abbreviated, or a new flag would break somebody's script.
    """

    #: Whether the verb's exit code is that of a command in a sandbox, so that it needs its own.
    passes_exit_on = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"allow_abbrev": False})

    @property
    def failed_exit(self) -> int:
        return exitcode.RUN_FAILED if self.passes_exit_on else exitcode.FAILED

    def error(self, message: str) -> NoReturn:
        code = exitcode.RUN_FAILED if self.passes_exit_on else exitcode.USAGE
        self.exit(code, f"sandmartin: {message}\nhint: {self.prog} --help\n")


def positive(text: str) -> int:
    """A whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def port_number(text: str) -> int:
    """1 to 65535."""
    number = positive(text)
    if number > _MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text} is above {_MAX_PORT}")
    return number


def seconds(text: str) -> int:
    """A whole number of seconds, 0 among them."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def add_shape_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every verb that makes a sandbox."""
    add = parser.add_argument
    add("-t", "--template", default="base", metavar="NAME", help="default: base")
    add("--memory", type=positive, metavar="MB", help="memory in MiB")
    add("--vcpus", type=positive, metavar="N", help="virtual CPUs")
    add("--disk", type=positive, metavar="MB", help="size of the root disk in MiB")


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every verb that runs a command."""
    add_env_flag(parser)
    add = parser.add_argument
    add("-u", "--user", default="", metavar="USER", help="user in the sandbox (default: root)")
    add("--cwd", default="", metavar="DIR", help="working directory (default: the user's home)")


def add_env_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="repeatable"
    )


def environment(pairs: Iterable[str]) -> dict[str, str]:
    """What the words of --env set. Raises Invalid."""
    return pairs_of(pairs, "--env")


def pairs_of(words: Iterable[str], flag: str) -> dict[str, str]:
    """Names and values of a repeatable flag. Raises Invalid."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise Invalid(f"{flag} {word!r} is not valid", hint="use NAME=VALUE")
        found[name] = value
    return found


def check_utf8(*words: str) -> None:
    """Raise Invalid where a word of the command line was not UTF-8: no message can carry it."""
    if any("\udc80" <= character <= "\udcff" for word in words for character in word):
        raise Invalid("a word of the command line is not UTF-8")


def add_settings_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every verb that has to do with the agent of this machine."""
    add_debug_flag(parser)
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="the agent's data directory, where its socket is (SANDMARTIN_DATA_DIR; "
        f"default {Settings().data_dir})",
    )
    parser.add_argument(
        "--settings", type=Path, metavar="FILE", help="TOML file with further settings"
    )


def add_place_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every verb that is for a control plane, or else for the agent of this machine."""
    add_server_flag(parser)
    add_settings_flags(parser)


def add_server_flag(parser: argparse.ArgumentParser) -> None:
    """The flag that says which control plane is meant; its key is never a word of ours."""
    parser.add_argument(
        "--server",
        default="",
        metavar="URL",
        help="the control plane (SANDMARTIN_URL, with SANDMARTIN_API_KEY; default: where you are "
        "logged in, else the agent on this machine; unix:PATH is an agent's socket)",
    )


def add_debug_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of every verb, and the verb's parser among what it parsed."""
    # Also behind the verb; SUPPRESS, or its default would undo the flag before the verb.
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.set_defaults(parser=parser)


def add_accel_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of every verb that may boot a VM."""
    parser.add_argument(
        "--accel",
        type=Accel,
        choices=list(Accel),
        metavar="auto|kvm|tcg",
        help="what executes the guest (SANDMARTIN_ACCEL; default auto: KVM where it works)",
    )


#: Settings of the control plane that have flags.
CONTROL_FLAGS = ("host", "port", "database_url", "domain", "tls_cert", "tls_key")


def add_control_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every verb that serves the control plane."""
    add = parser.add_argument
    add("--host", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, help="0 takes a free one (default: 8000)")
    add("--database-url", metavar="URL", help="default: SQLite in the data dir")
    add("--domain", metavar="NAME", help="sandboxes' ports are at PORT-ID.NAME")
    add("--tls-cert", metavar="FILE", help="serve https with this certificate and its chain (PEM)")
    add("--tls-key", metavar="FILE", help="the certificate's key (PEM)")


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def load_settings(args: argparse.Namespace) -> Settings:
    """Settings from flags, environment and file. Raises Invalid."""
    flags = {"data_dir": args.data_dir, "accel": getattr(args, "accel", None)}
    return Settings.load(flags, file=args.settings)
