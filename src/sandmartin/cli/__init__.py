"""The `sandmartin` command: one module per verb, each with `configure` and what it does.

A verb's function takes the parsed arguments and returns the exit code. Errors of ours are printed
here as sentence and hint; anything else is a bug and shows its traceback. Parts that only an
installation with extras has are imported inside the verbs that need them.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence

from sandmartin import __version__
from sandmartin.cli import agent, doctor, exitcode, run, sandboxes, setup
from sandmartin.cli.options import Parser
from sandmartin.cli.pipes import drop_stdout, occupy_standard_streams
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
        verb.set_defaults(parser=verb)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`; what stands behind `--` is the command of `run`, untouched.

    argparse treats `--` differently from release to release, so it never sees it.
    """
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    args, unknown = build_parser().parse_known_args(words[:cut])
    # By the verb's own parser, which knows the verb's exit code for it.
    if unknown:
        args.parser.error(f"unknown arguments: {' '.join(unknown)}")
    if args.verb == "run":
        # `run sh -c '...' -- x`: the command has begun, so this `--` is one of its words.
        args.command += words[cut:] if args.command else words[cut + 1 :]
    elif words[cut + 1 :]:
        args.parser.error(f"{args.verb} takes no command: {' '.join(words[cut + 1 :])}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's by default) and return its exit code."""
    occupy_standard_streams()
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        code: int = args.act(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        say("sandmartin: interrupted")
        return exitcode.SIGNALLED + signal.SIGINT
    except BrokenPipeError:
        drop_stdout()
        return exitcode.SIGNALLED + signal.SIGPIPE
    except SandmartinError as error:
        if args.debug:
            traceback.print_exception(error)
        say_error(error)
        not_started = args.verb == "run" and isinstance(error, NotStarted)
        return exitcode.NOT_STARTED if not_started else _failed(args)
    except Exception:  # noqa: BLE001
        # A bug; and what Python itself would exit with is an exit code of the command in `run`.
        traceback.print_exc()
        return _failed(args)
    return code


def _failed(args: argparse.Namespace) -> int:
    return exitcode.RUN_FAILED if args.verb == "run" else exitcode.FAILED
