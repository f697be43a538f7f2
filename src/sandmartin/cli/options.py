"""Flags that several verbs share, and how they become Settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from sandmartin.cli import exitcode
from sandmartin.model import Accel, Settings


class Parser(argparse.ArgumentParser):
    """argparse, with the exit code of wrong usage as the verb has it and `hint:` as we have it.

    Flags are not abbreviated, or a new flag would break somebody's script.
    """

    usage_exit = exitcode.USAGE

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        self.exit(self.usage_exit, f"sandmartin: {message}\nhint: {self.prog} --help\n")


def positive(text: str) -> int:
    """A whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def add_settings_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every verb that needs Settings."""
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


def add_accel_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of every verb that may boot a VM."""
    parser.add_argument(
        "--accel",
        type=Accel,
        choices=list(Accel),
        metavar="auto|kvm|tcg",
        help="what executes the guest (SANDMARTIN_ACCEL; default auto: KVM where it works)",
    )


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def load_settings(args: argparse.Namespace) -> Settings:
    """Settings from flags, environment and file. Raises Invalid."""
    flags = {"data_dir": args.data_dir, "accel": getattr(args, "accel", None)}
    return Settings.load(flags, file=args.settings)
