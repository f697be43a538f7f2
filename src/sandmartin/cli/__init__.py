"""The `sandmartin` command: a `configure` for each verb, in a module with what the verb does.

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
from sandmartin.cli import (
    agent,
    checkpoints,
    commands,
    completion,
    control,
    doctor,
    exitcode,
    files,
    hosts,
    keys,
    login,
    ports,
    records,
    run,
    sandboxes,
    setup,
    shell,
    templates,
    up,
)
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
        up.configure,
        run.configure,
        sandboxes.configure_create,
        sandboxes.configure_ls,
        sandboxes.configure_info,
        commands.configure_ps,
        commands.configure_exec,
        shell.configure,
        files.configure,
        sandboxes.configure_pause,
        sandboxes.configure_resume,
        sandboxes.configure_fork,
        checkpoints.configure_checkpoint,
        checkpoints.configure_checkpoints,
        checkpoints.configure_rollback,
        templates.configure_snapshot,
        templates.configure_template,
        sandboxes.configure_kill,
        records.configure_logs,
        records.configure_metrics,
        ports.configure,
        login.configure_login,
        login.configure_logout,
        keys.configure,
        control.configure,
        agent.configure,
        hosts.configure,
        setup.configure,
        doctor.configure,
        completion.configure,
    ):
        configure(verbs)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`; what stands behind `--` is the command of `run` or `exec`, untouched.

    argparse treats `--` differently from release to release, so it never sees it.
    """
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    args, unknown = build_parser().parse_known_args(words[:cut])
    # By the verb's own parser, which knows the verb's exit code for it.
    if unknown:
        args.parser.error(f"unknown arguments: {' '.join(unknown)}")
    if "command" in args:
        # `run sh -c '...' -- x`: the command has begun, so this `--` is one of its words.
        args.command += words[cut:] if args.command else words[cut + 1 :]
    elif words[cut + 1 :]:
        args.parser.error(f"{args.verb} takes no command: {' '.join(words[cut + 1 :])}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's by default) and return its exit code."""
    occupy_standard_streams()
    if completion.is_asked():
        completion.complete(build_parser())
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
        not_started = args.parser.passes_exit_on and isinstance(error, NotStarted)
        return exitcode.NOT_STARTED if not_started else _failed(args)
    except Exception:  # noqa: BLE001
        # A bug; what Python itself would exit with could be the exit code of a command.
        traceback.print_exc()
        return _failed(args)
    return code


def _failed(args: argparse.Namespace) -> int:
    code: int = args.parser.failed_exit
    return code
