"""`sandmartin completion`: what lets a shell complete our words, ids of sandboxes among them."""

from __future__ import annotations

import argparse
import os
from typing import Any

from sandmartin.cli.options import add_debug_flag

_SHELLS = ("bash", "zsh", "fish")
_DESCRIPTION = """\
Print the lines that let a shell complete sandmartin's words. For good:
  bash:  sandmartin completion bash > ~/.local/share/bash-completion/completions/sandmartin
  zsh:   sandmartin completion zsh > DIR/_sandmartin, with DIR in $fpath
  fish:  sandmartin completion fish > ~/.config/fish/completions/sandmartin.fish
"""


def configure(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "completion",
        help="print what completes our words in a shell",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=_SHELLS)
    add_debug_flag(parser)
    parser.set_defaults(act=_print)


def _print(args: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode  # noqa: PLC0415

    print(shellcode(["sandmartin"], shell=args.shell))
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks how a word may go on, and exit."""
    # Here, for its import takes longer than all the rest of a short verb.
    import argcomplete  # noqa: PLC0415

    argcomplete.autocomplete(parser)


def is_asked() -> bool:
    return "_ARGCOMPLETE" in os.environ
