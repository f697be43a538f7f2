"""Reading a Dockerfile: its stages, and what stands outside of them.

The usual subset, by the rules of the Dockerfile reference. What would make another image than
Docker makes is refused by line and name; what only has no meaning for a sandbox is noted. Parsers
on PyPI either take the lines of a heredoc for instructions or know no columns; so this is ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sandmartin.context.source import InvalidBuild, Note, Position, is_plain, quoted
from sandmartin.control.builds import plan
from sandmartin.control.builds.instructions import Instruction, pairs, read_step
from sandmartin.control.builds.lines import Line, Source, Span
from sandmartin.control.builds.text import Text, read_text

MAX_STEPS = 1000
MAX_STAGES = 50
_KEYWORD = re.compile(r"[A-Za-z]+(?=[ \t]|$)")
_STAGE = re.compile(r"[a-z][a-z0-9_.-]{0,127}")
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,511}")
_PLATFORM = ("linux/amd64", "amd64", "linux/x86_64")
#: What Docker declares by itself, for us the one platform there is.
_PLATFORM_ARGUMENTS = {
    f"{whose}{what}": value
    for whose in ("TARGET", "BUILD")
    for what, value in (
        ("PLATFORM", "linux/amd64"),
        ("OS", "linux"),
        ("ARCH", "amd64"),
        ("VARIANT", ""),
    )
}
_PROXIES = frozenset(
    name
    for each in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for name in (each, each.lower())
)


def read_dockerfile(
    text: str,
    *,
    file: str = "Dockerfile",
    arguments: Mapping[str, str] | None = None,
    target: str = "",
) -> plan.Build:
    """The build that a Dockerfile describes, up to the stage `target`, or else the last.

    `arguments` are values for its ARGs. Stages that the target does not need are read and left
    out. Raises InvalidBuild, which names the place.
    """
    arguments = dict(arguments or {})
    for name, value in arguments.items():
        if not is_plain(name + value):
            raise InvalidBuild(f"the argument {quoted(name)} has a zero byte, or is not UTF-8")
    reader = _Reader(Source(text, file), arguments)
    for line in reader.source.lines():
        reader.take(line)
    return reader.build(target)


@dataclass
class _Stage:
    name: str
    ground: plan.Ground
    position: Position
    steps: list[plan.AnyStep] = field(default_factory=list)


class _Reader:
    def __init__(self, source: Source, arguments: dict[str, str]) -> None:
        self.source = source
        self._arguments = arguments
        self._stages: list[_Stage] = []
        #: Values of ARGs that stand before the first FROM.
        self._globals = dict(_PLATFORM_ARGUMENTS)
        self._notes: list[Note] = []
        self._declared: set[str] = set(_PLATFORM_ARGUMENTS) | _PROXIES
        self._count = 0

    def take(self, line: Line) -> None:
        found = _KEYWORD.match(line.text)
        word, rest = line.whole.first_word()
        if found is None:
            raise word.error("is no instruction", hint="a line begins with a word such as RUN")
        name = word.text.upper()
        self._count += 1
        if self._count > MAX_STEPS:
            raise word.error(f"is one instruction too many; {MAX_STEPS} are the most")
        instruction = Instruction(name, word, rest, self.source.escape, self._notes)
        if name == "FROM":
            self._from(instruction)
        elif name == "ARG":
            self._arg(instruction)
        else:
            self._step(instruction)

    def _step(self, instruction: Instruction) -> None:
        step = read_step(instruction)
        if not self._stages:
            raise instruction.keyword.error(
                "comes before the first FROM", hint="only ARG may stand before FROM"
            )
        if step is None:
            return
        if isinstance(step, plan.Copy) and isinstance(step.origin, plan.FromStage):
            step = replace(step, origin=self._origin(step.origin.name, instruction))
        self._stages[-1].steps.append(step)

    def _origin(self, name: str, instruction: Instruction) -> plan.Origin:
        """What `--from` names: an earlier stage, by name or number, or else an image."""
        earlier = self._stages[:-1]
        if name.isascii() and name.isdigit():
            if len(name) > 3 or int(name) >= len(earlier):
                raise instruction.keyword.error(
                    f"copies from stage {quoted(name)}, and there is no such stage before it"
                )
            return plan.FromStage(earlier[int(name)].name)
        if name.lower() in {stage.name for stage in earlier}:
            return plan.FromStage(name.lower())
        if name.lower() == self._stages[-1].name:
            raise instruction.keyword.error("copies from its own stage")
        if not _REFERENCE.fullmatch(name):
            raise instruction.keyword.error(f"copies from {quoted(name)}, which is no image")
        return plan.Image(name)

    def _from(self, instruction: Instruction) -> None:
        flags, rest = instruction.flags("platform")
        words = rest.words()
        if len(words) not in (1, 3) or (len(words) == 3 and words[1].text.upper() != "AS"):
            raise instruction.keyword.error(
                "has other words than an image and a name", hint="write FROM IMAGE [AS NAME]"
            )
        if (platform := flags.get("platform")) is not None:
            self._check_platform(platform, instruction)
        if len(self._stages) == MAX_STAGES:
            raise instruction.keyword.error(f"is one stage too many; {MAX_STAGES} are the most")
        name = self._stage_name(words[2]) if len(words) == 3 else str(len(self._stages))
        ground = self._ground(words[0], instruction)
        self._stages.append(_Stage(name, ground, instruction.keyword.position))

    def _check_platform(self, platform: Span, instruction: Instruction) -> None:
        value = read_text(platform, instruction.dialect).expand(self._globals)
        if value.lower() not in _PLATFORM:
            raise platform.error(
                f"asks for platform {quoted(value)}", hint="sandboxes are linux/amd64"
            )

    def _stage_name(self, word: Span) -> str:
        name = word.text.lower()
        if not _STAGE.fullmatch(name):
            raise word.error("is no name of a stage", hint="use a-z, 0-9, dot, dash, underscore")
        if name in {stage.name for stage in self._stages}:
            raise word.error("is the name of an earlier stage")
        return name

    def _ground(self, word: Span, instruction: Instruction) -> plan.Ground:
        value = read_text(word, instruction.dialect).expand(self._globals)
        if value.lower() in {stage.name for stage in self._stages if not stage.name.isdigit()}:
            return plan.FromStage(value.lower())
        if value == "scratch":
            return plan.Scratch()
        if not _REFERENCE.fullmatch(value):
            raise word.error(
                f"comes to {quoted(value)}, which is no image",
                hint="a variable in FROM needs an ARG before the first FROM",
            )
        return plan.Image(value)

    def _arg(self, instruction: Instruction) -> None:
        found = pairs(instruction, needs_value=False)
        for word, value in found:
            self._declared.add(word.text)
            if not self._stages:
                given = self._arguments.get(word.text)
                if given is None and value is not None:
                    given = value.expand(self._globals)
                if given is not None:
                    self._globals[word.text] = given
                continue
            if value is None and word.text in self._globals:
                value = Text.literal(self._globals[word.text], word.position)
            self._stages[-1].steps.append(
                plan.Arg(
                    position=word.position,
                    written=instruction.written,
                    name=word.text,
                    value=value,
                )
            )

    def build(self, target: str) -> plan.Build:
        if not self._stages:
            raise InvalidBuild(
                f"{self.source.file} has no FROM", hint="the first instruction names an image"
            )
        stages = [
            plan.Stage(each.name, each.ground, tuple(each.steps), each.position)
            for each in self._stages
        ]
        for name in sorted(set(self._arguments) - self._declared):
            place = Position(self.source.file, 1)
            self._notes.append(Note(place, f"no ARG declares the argument {quoted(name)}"))
        return plan.Build(
            stages=_needed(stages, target, self.source.file),
            arguments=tuple(sorted(self._arguments.items())),
            notes=tuple(self._notes),
        )


def _needed(stages: list[plan.Stage], target: str, file: str) -> tuple[plan.Stage, ...]:
    """The target, after all that it needs; a stage only ever needs earlier ones."""
    by_name = {stage.name: stage for stage in stages}
    last = by_name.get(target.lower()) if target else stages[-1]
    if last is None:
        raise InvalidBuild(
            f"{file} has no stage {quoted(target)}", hint=f"it has {', '.join(by_name)[:200]}"
        )
    needed, left = {last.name}, [last]
    while left:
        for name in left.pop().needs - needed:
            needed.add(name)
            left.append(by_name[name])
    return tuple(stage for stage in stages if stage.name in needed)
