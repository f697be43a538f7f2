"""Reading a recipe: the short language of template builds, one instruction a line.

    RUN [--timeout=30s] COMMAND     must exit 0 in time
    START COMMAND                   is left running
    ENV NAME=VALUE                  $NAME, ${NAME} and $$ in the value are expanded
    WORKDIR PATH                    is made
    USER NAME                       is made, with sudo that asks for no password
    COPY SOURCE... DESTINATION      from the uploaded files; they become the user's
    HEALTHCHECK [--interval=3s] [--timeout=10s] [--start-period=0] [--retries=0] COMMAND

What it starts from is said beside it. Before its steps the package lists are read anew and a user
made, after them the caches of packages are emptied, unless both are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from sandmartin.context.source import InvalidBuild, Position
from sandmartin.control.builds import plan
from sandmartin.control.builds.instructions import Instruction, number
from sandmartin.control.builds.lines import Source, Span
from sandmartin.control.builds.text import Dialect, Text, read_text

DEFAULT_USER = "user"
RUN_TIMEOUT_S = 30.0
COPY_TIMEOUT_S = 60.0
PHASE_TIMEOUT_S = 600.0
MAX_STEPS = 1000
_DIALECT = Dialect(doubled=True)
_CHECK_FLAGS = ("interval", "timeout", "start-period", "retries")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_UPDATE = (
    "if command -v apt-get; then apt-get update; elif command -v apk; then apk update;"
    " elif command -v dnf; then dnf -q makecache; fi"
)
_CLEAN_UP = (
    "if command -v apt-get; then apt-get clean; rm -rf /var/lib/apt/lists/*;"
    " elif command -v apk; then rm -rf /var/cache/apk/*;"
    " elif command -v dnf; then dnf -q clean all; fi; rm -rf /tmp/* /var/tmp/*"
)


def read_recipe(
    text: str, ground: plan.Ground, *, file: str = "recipe", skip_pre_post: bool = False
) -> plan.Build:
    """The build that a recipe describes on `ground`. Raises InvalidBuild, which names the place."""
    steps: list[plan.AnyStep] = []
    for line in Source(text, file, directives=False, documents=False).lines():
        word, rest = line.whole.first_word()
        instruction = Instruction(word.text.upper(), word, rest, "\\", [])
        reader = _READERS.get(instruction.name)
        if reader is None:
            raise word.error("is no instruction", hint=f"known are {', '.join(_READERS)}")
        instruction.needs(rest)
        if len(steps) == MAX_STEPS:
            raise word.error(f"is one instruction too many; {MAX_STEPS} are the most")
        steps.append(reader(instruction))
    if not steps and not skip_pre_post:
        raise InvalidBuild(f"{file} has no instruction")
    checks = [step for step in steps if isinstance(step, plan.Healthcheck)]
    if len(checks) > 1:
        raise InvalidBuild("a second HEALTHCHECK", position=checks[1].position, hint="keep one")
    place = Position(file, 1)
    around = ([], []) if skip_pre_post else (_before(place), _after(place))
    stage = plan.Stage("0", ground, (*around[0], *steps, *around[1]), place)
    return plan.Build(stages=(stage,))


def _before(place: Position) -> list[plan.AnyStep]:
    user = Text.literal(DEFAULT_USER, place)
    return [
        _ours(_UPDATE, plan.Phase.PRE, place),
        plan.User(
            position=place,
            written=f"USER {DEFAULT_USER}",
            phase=plan.Phase.PRE,
            name=user,
            ensure=True,
        ),
        plan.Workdir(
            position=place,
            written=f"WORKDIR /home/{DEFAULT_USER}",
            phase=plan.Phase.PRE,
            path=Text.literal(f"/home/{DEFAULT_USER}", place),
        ),
    ]


def _after(place: Position) -> list[plan.AnyStep]:
    return [_ours(_CLEAN_UP, plan.Phase.POST, place)]


def _ours(line: str, phase: plan.Phase, place: Position) -> plan.Run:
    return plan.Run(
        position=place,
        written=f"RUN {line}",
        phase=phase,
        command=plan.Command(line=line),
        timeout_s=PHASE_TIMEOUT_S,
        user=Text.literal("root", place),
    )


def _run(instruction: Instruction) -> plan.Run:
    flags, rest = instruction.flags("timeout")
    timeout_s = flags["timeout"].duration_s() if "timeout" in flags else RUN_TIMEOUT_S
    if timeout_s == 0:
        raise flags["timeout"].error("leaves no time", hint="leave --timeout out for 30s")
    command = plan.Command(line=instruction.needs(rest).text)
    return instruction.step(plan.Run, command=command, timeout_s=timeout_s)


def _start(instruction: Instruction) -> plan.Start:
    return instruction.step(plan.Start, command=plan.Command(line=instruction.rest.text))


def _env(instruction: Instruction) -> plan.Env:
    name, value = instruction.rest.partition("=")
    if value is None or not _VARIABLE.fullmatch(name.text):
        raise instruction.rest.error("sets no variable", hint="write ENV NAME=VALUE")
    quote = value.text[:1]
    if quote in ("'", '"') and len(value.text) > 1 and value.text.endswith(quote):
        value = value.part(1, len(value.text) - 1)
    return instruction.step(plan.Env, pairs=((name.text, read_text(value, _DIALECT)),))


def _workdir(instruction: Instruction) -> plan.Workdir:
    return instruction.step(plan.Workdir, path=_plain(instruction.rest))


def _user(instruction: Instruction) -> plan.User:
    if ":" in instruction.rest.text:
        raise instruction.rest.error("is no name of a user", hint="write USER NAME")
    return instruction.step(plan.User, name=_plain(instruction.rest), ensure=True)


def _copy(instruction: Instruction) -> plan.Copy:
    words = instruction.rest.words()
    if len(words) < 2:
        raise instruction.rest.error("has no destination", hint="write COPY SOURCE... DESTINATION")
    for word in words[:-1]:
        if word.text.startswith("/") or ".." in word.text.split("/"):
            raise word.error("leaves the uploaded files", hint="write a path relative to them")
    # Several sources need a directory, which other languages make the user mark.
    destination = _plain(words[-1])
    if len(words) > 2 and not words[-1].text.endswith("/"):
        destination = Text.literal(f"{words[-1].text}/", words[-1].position)
    return instruction.step(
        plan.Copy,
        sources=tuple(_plain(word) for word in words[:-1]),
        destination=destination,
        to_user=True,
        timeout_s=COPY_TIMEOUT_S,
    )


def _healthcheck(instruction: Instruction) -> plan.Healthcheck:
    flags, rest = instruction.flags(*_CHECK_FLAGS)
    default = plan.Check(command=plan.Command(line=instruction.needs(rest).text))
    interval_s = _time(flags, "interval", default.interval_s)
    if interval_s == 0:
        raise flags["interval"].error("is no interval", hint="use 1s or more")
    check = plan.Check(
        command=default.command,
        interval_s=interval_s,
        timeout_s=_time(flags, "timeout", default.timeout_s),
        start_period_s=_time(flags, "start-period", default.start_period_s),
        start_interval_s=interval_s,
        retries=number(flags["retries"]) if "retries" in flags else default.retries,
    )
    return instruction.step(plan.Healthcheck, check=check)


def _time(flags: dict[str, Span], name: str, default: float) -> float:
    return flags[name].duration_s() if name in flags else default


def _plain(span: Span) -> Text:
    return Text.literal(span.text, span.position)


_READERS: dict[str, Callable[[Instruction], plan.AnyStep]] = {
    "RUN": _run,
    "START": _start,
    "ENV": _env,
    "WORKDIR": _workdir,
    "USER": _user,
    "COPY": _copy,
    "HEALTHCHECK": _healthcheck,
}
