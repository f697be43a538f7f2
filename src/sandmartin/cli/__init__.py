"""The `sandmartin` command: one module per verb, each with `configure` and what it does.

A verb's function takes the parsed arguments and returns the exit code. Errors of ours are printed
here as sentence and hint; anything else is a bug and shows its traceback. Parts that only an
installation with extras has are imported inside the verbs that need them.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from sandmartin import __version__
from sandmartin.cli import agent, doctor, exitcode, run, sandboxes, setup
from sandmartin.cli.options import Parser
from sandmartin.cli.talk import say, say_error
from sandmartin.errors import NotStarted, SandmartinError


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="sandmartin",
        description="Run code in microVMs of its own: one sandbox for every agent, user or job.",
        epilog=exitcode.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sandmartin {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the agent's log")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for configure in (
        run.configure,
        sandboxes.configure_ls,
        sandboxes.configure_kill,
        agent.configure,
        setup.configure,
        doctor.configure,
    ):
        verb = configure(verbs)
        # Also behind the verb; SUPPRESS, or its default would undo the flag before the verb.
        verb.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`; what stands behind `--` is the command of `run`, untouched.

    argparse treats `--` differently from release to release, so it never sees it.
    """
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    args = build_parser().parse_args(words[:cut])
    if args.verb == "run":
        # `run sh -c '...' -- x`: the command has begun, so this `--` is one of its words.
        args.command += words[cut:] if args.command else words[cut + 1 :]
    elif words[cut + 1 :]:
        build_parser().error(f"{args.verb} takes no command: {' '.join(words[cut + 1 :])}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's by default) and return its exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        code: int = args.act(args)
    except SandmartinError as error:
        if args.debug:
            traceback.print_exception(error)
        say_error(error)
        if args.verb != "run":
            return exitcode.FAILED
        return exitcode.NOT_STARTED if isinstance(error, NotStarted) else exitcode.RUN_FAILED
    except KeyboardInterrupt:
        say("sandmartin: interrupted")
        return exitcode.SIGNALLED + 2
    except BrokenPipeError:
        return exitcode.SIGNALLED + 13
    return code
