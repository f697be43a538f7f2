"""The languages: how the kernel of each is started, and how its surroundings are changed.

A change is source code that is run silently in the kernel before the caller's. Values of the
environment may be secrets: they are part of that code alone, and of no command line or file.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

_SHELL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: ASCII that is neither a letter nor a digit.
_SPECIAL = re.compile(r"[\x01-/:-@\[-`{-\x7f]")
_SAVED = "__code_interpreter_"


class UnknownLanguage(Exception):
    """No kernel here runs that language."""


@dataclass(frozen=True)
class Change:
    """What is to be different in a kernel before code is run."""

    set: Mapping[str, str] = field(default_factory=dict, repr=False)
    unset: tuple[str, ...] = ()
    #: For one execution alone; what was there before is there again after it.
    during: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: It runs in another sandbox than before: random numbers must be others too.
    reseed: bool = False

    def __bool__(self) -> bool:
        return bool(self.set or self.unset or self.during or self.reseed)


@dataclass(frozen=True)
class Language:
    """A language and its kernel."""

    name: str
    #: Where `{connection_file}` is replaced.
    argv: tuple[str, ...]
    transport: str = "ipc"
    #: `signal` or `message`, as in the kernel specifications of Jupyter.
    interrupts_by: str = "signal"
    #: Its kernel may say that it is through before it has said all.
    hasty: bool = False

    def change(self, change: Change) -> str:
        """Source code that makes a change."""
        raise NotImplementedError

    def restore(self) -> str:
        """Source code that takes back what was for one execution alone."""
        raise NotImplementedError


class _Python(Language):
    def change(self, change: Change) -> str:
        words = (dict(change.set), change.unset, dict(change.during), change.reseed)
        return f"{_INSIDE}.change(*{words!r})"

    def restore(self) -> str:
        return f"{_INSIDE}.restore()"


#: Without a name in the caller's namespace.
_INSIDE = "__import__('code_interpreter.inside.surroundings', fromlist=['change'])"


class _JavaScript(Language):
    def change(self, change: Change) -> str:
        during = json.dumps(dict(change.during))
        # What a Map of the global object holds is there for `restore` alone.
        return (
            f"for (const [k, v] of Object.entries({json.dumps(dict(change.set))})) "
            "Deno.env.set(k, v);\n"
            f"for (const k of {json.dumps(change.unset)}) Deno.env.delete(k);\n"
            "globalThis[Symbol.for('code-interpreter')] = new Map();\n"
            f"for (const [k, v] of Object.entries({during})) {{\n"
            "  globalThis[Symbol.for('code-interpreter')].set(k, Deno.env.get(k));\n"
            "  Deno.env.set(k, v);\n"
            "}"
        )

    def restore(self) -> str:
        return (
            "for (const [k, v] of globalThis[Symbol.for('code-interpreter')] ?? []) "
            "v === undefined ? Deno.env.delete(k) : Deno.env.set(k, v);"
        )


class _Bash(Language):
    def change(self, change: Change) -> str:
        # One line: a kernel that reads lines would ask for more after each of several.
        words = [f"unset {name}" for name in change.unset if _is_shell_name(name)]
        words += [f"export {name}={_quoted(value)}" for name, value in _shell(change.set)]
        for name, value in _shell(change.during):
            words.append(f'[ -z "${{{name}+x}}" ] || {_SAVED}{name}=${name}')
            words.append(f"export {name}={_quoted(value)}")
            words.append(f"{_SAVED}+=({name})")
        if change.reseed:
            words.append(f"RANDOM={secrets.randbelow(1 << 31)}")
        return "; ".join(words) or "true"

    def restore(self) -> str:
        saved = f"{_SAVED}$_n"
        return (
            f'for _n in "${{{_SAVED}[@]}}"; do _o={saved}; '
            'if [ -n "${!_o+x}" ]; then export "$_n=${!_o}"; unset "$_o"; else unset "$_n"; fi; '
            f"done; unset _n _o {_SAVED}"
        )


def _is_shell_name(name: str) -> bool:
    return _SHELL_NAME.fullmatch(name) is not None


def _shell(envs: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in envs.items() if _is_shell_name(name)]


def _quoted(value: str) -> str:
    """A word of bash, in its form with escapes: `$'...'`."""
    return "$'" + _SPECIAL.sub(lambda found: f"\\x{ord(found[0]):02x}", value) + "'"


#: After it a Python kernel knows nothing of what was run in it.
FORGET = "get_ipython().reset(new_session=True)"

_CONNECTION = "{connection_file}"

PYTHON = _Python(
    "python",
    (
        *(sys.executable, "-m", "ipykernel_launcher", "-f", _CONNECTION),
        "--ext=code_interpreter.inside",
        # Whoever reads tracebacks here is a program, or has colours of its own.
        "--InteractiveShell.colors=nocolor",
        "--HistoryManager.enabled=False",
    ),
)
JAVASCRIPT = _JavaScript(
    "javascript",
    ("deno", "jupyter", "--kernel", "--conn", _CONNECTION),
    # It knows no other way.
    transport="tcp",
    interrupts_by="message",
    hasty=True,
)
# A file of the caller's in the directory is no module of it.
BASH = _Bash("bash", (sys.executable, "-P", "-m", "bash_kernel", "-f", _CONNECTION))

_BY_NAME = {
    "python": PYTHON,
    "python3": PYTHON,
    "javascript": JAVASCRIPT,
    "js": JAVASCRIPT,
    # One kernel runs both, so they share their state as well.
    "typescript": JAVASCRIPT,
    "ts": JAVASCRIPT,
    "bash": BASH,
    "sh": BASH,
}


def find(name: str) -> Language:
    """The language called so. Raises UnknownLanguage."""
    language = _BY_NAME.get(name.lower())
    if language is None:
        raise UnknownLanguage(
            f"language {name[:80]!r} is not supported; use python, javascript, typescript or bash"
        )
    return language
