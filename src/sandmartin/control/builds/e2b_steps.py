"""Reading the steps that E2B's SDKs send: `{type, args, filesHash, force}`, in order.

A step has no line, so the place in an error is the step's number, counted from 1, and the column
that of its argument.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sandmartin.context.source import InvalidBuild, Position, is_plain, quoted
from sandmartin.control.builds import plan
from sandmartin.control.builds.instructions import read_mode
from sandmartin.control.builds.lines import MAX_SOURCE_BYTES, Line, Span
from sandmartin.control.builds.text import Dialect, Text, read_text

MAX_STEPS = 1000
DEFAULT_USER = "user"
_FILE = "steps"
_DIALECT = Dialect(escape="\\")
_HASH = re.compile(r"[0-9A-Za-z_-]{1,128}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,255}")
_KNOWN = {"type", "args", "filesHash", "force"}
_Step = TypeVar("_Step", bound=plan.Step)


@dataclass(frozen=True)
class _Given:
    """One step as it was sent."""

    number: int
    word: str
    args: tuple[str, ...]
    files_hash: str
    force: bool

    @property
    def position(self) -> Position:
        return Position(_FILE, self.number)

    def argument(self, index: int) -> Span:
        """An argument; an empty one when it was not sent."""
        text = self.args[index] if index < len(self.args) else ""
        return Span(Line(_FILE, text, (0,), ((self.number, index + 1),)), 0, text)

    def text(self, index: int) -> Text:
        """An argument with its variables."""
        return read_text(self.argument(index), _DIALECT)

    def plain(self, index: int) -> Text:
        return Text.literal(self.args[index], self.argument(index).position)

    def step(self, kind: type[_Step], **fields: Any) -> _Step:
        written = " ".join([self.word, *self.args])
        return kind(position=self.position, written=written, force=self.force, **fields)

    def needs(self, least: int, most: int) -> None:
        if not least <= len(self.args) <= most or not all(self.args[:least]):
            raise InvalidBuild(
                f"{self.word} has {len(self.args)} arguments",
                position=self.position,
                hint=f"it takes {least}" + (f" to {most}" if most != least else ""),
            )


def read_steps(
    steps: Sequence[Mapping[str, Any]],
    ground: plan.Ground,
    *,
    start: str = "",
    ready: str = "",
    force: bool = False,
    as_user: bool = False,
) -> plan.Build:
    """The build of these steps on `ground`; `start` is left running, and then `ready` must exit 0.

    On an image the user is made first whom sandboxes have by default, on a template if `as_user`.
    Raises InvalidBuild, which names the step.
    """
    if len(steps) > MAX_STEPS:
        raise InvalidBuild(f"there are {len(steps)} steps; {MAX_STEPS} are the most")
    given = [_given(number, raw) for number, raw in enumerate(steps, 1)]
    if sum(len(arg) for each in given for arg in each.args) > MAX_SOURCE_BYTES:
        raise InvalidBuild(f"the steps are larger than {MAX_SOURCE_BYTES} bytes")
    is_ours = isinstance(ground, plan.Template) and not as_user
    read: list[plan.AnyStep] = [] if is_ours else _default_user()
    for each in given:
        reader = _READERS.get(each.word.upper())
        if reader is None:
            raise InvalidBuild(
                f"{quoted(each.word)} is no step",
                position=each.position,
                text=each.word,
                hint=f"known are {', '.join(_READERS)}",
            )
        read.append(reader(each))
    read += _ending(start, ready, Position(_FILE, len(steps) + 1))
    if force and read:
        # It holds for all that follows, too.
        read[0] = replace(read[0], force=True)
    stage = plan.Stage("0", ground, tuple(read), Position(_FILE, 1))
    return plan.Build(stages=(stage,))


def _ending(start: str, ready: str, position: Position) -> list[plan.AnyStep]:
    """What is started after all steps, and when it is ready."""
    if not (is_plain(start) and is_plain(ready)):
        raise InvalidBuild("the start or ready command has a zero byte, or no UTF-8")
    steps: list[plan.AnyStep] = []
    if start:
        command = plan.Command(line=start)
        steps.append(plan.Start(position=position, written=start, command=command))
    if ready:
        # Often it only sleeps, for as long as its author thought right; the build has its limit.
        check = plan.Check(command=plan.Command(line=ready), timeout_s=0.0)
        steps.append(plan.Healthcheck(position=position, written=ready, check=check))
    return steps


def _given(number: int, raw: Any) -> _Given:
    position = Position(_FILE, number)
    if not isinstance(raw, Mapping) or not isinstance(raw.get("type"), str):
        raise InvalidBuild("a step has no type", position=position, hint='send {"type": "RUN"}')
    if unknown := sorted(str(key) for key in set(raw) - _KNOWN):
        raise InvalidBuild(f"a step has an unknown {quoted(unknown[0])}", position=position)
    args, files_hash = raw.get("args"), raw.get("filesHash")
    args = [] if args is None else args
    if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args):
        raise InvalidBuild("a step's args are no list of strings", position=position)
    if not all(map(is_plain, args)):
        raise InvalidBuild("a step's args have a zero byte, or no UTF-8", position=position)
    if files_hash is not None and not (isinstance(files_hash, str) and _HASH.fullmatch(files_hash)):
        raise InvalidBuild("a step's filesHash is no hash", position=position)
    return _Given(number, raw["type"], tuple(args), files_hash or "", raw.get("force") is True)


def _default_user() -> list[plan.AnyStep]:
    given = _Given(1, "USER", (DEFAULT_USER, "true"), "", False)
    home = _Given(1, "WORKDIR", (f"/home/{DEFAULT_USER}",), "", False)
    return [
        given.step(plan.User, name=given.plain(0), ensure=True, phase=plan.Phase.PRE),
        home.step(plan.Workdir, path=home.plain(0), phase=plan.Phase.PRE),
    ]


def _run(given: _Given) -> plan.Run:
    given.needs(1, 2)
    user = given.plain(1) if len(given.args) == 2 and given.args[1] else None
    return given.step(plan.Run, command=plan.Command(line=given.args[0]), user=user)


def _copy(given: _Given) -> plan.Copy:
    given.needs(2, 4)
    if not given.files_hash:
        raise InvalidBuild(
            "COPY has no filesHash", position=given.position, hint="upload its files first"
        )
    owner = given.plain(2) if given.argument(2).text else None
    mode = read_mode(given.argument(3)) if given.argument(3).text else None
    return given.step(
        plan.Copy,
        sources=(given.plain(0),),
        destination=given.plain(1),
        origin=plan.Upload(given.files_hash),
        owner=owner,
        to_user=True,
        mode=mode,
    )


def _env(given: _Given) -> plan.Env:
    if not given.args or len(given.args) % 2:
        raise InvalidBuild("ENV has a name without a value", position=given.position)
    for index, name in enumerate(given.args):
        if index % 2 == 0 and not _VARIABLE.fullmatch(name):
            raise given.argument(index).error("is no name of a variable")
    found = ((given.args[index], given.text(index + 1)) for index in range(0, len(given.args), 2))
    return given.step(plan.Env, pairs=tuple(found))


def _workdir(given: _Given) -> plan.Workdir:
    given.needs(1, 1)
    return given.step(plan.Workdir, path=given.text(0))


def _user(given: _Given) -> plan.User:
    given.needs(1, 2)
    return given.step(plan.User, name=given.plain(0), ensure=given.argument(1).text == "true")


_READERS: dict[str, Callable[[_Given], plan.AnyStep]] = {
    "COPY": _copy,
    "ENV": _env,
    "RUN": _run,
    "USER": _user,
    "WORKDIR": _workdir,
}
