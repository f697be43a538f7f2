"""The instructions of a Dockerfile's stage, each to the step that it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sandmartin.context.source import InvalidBuild, Note, Position, quoted
from sandmartin.control.builds import plan
from sandmartin.control.builds.lines import Document, Span
from sandmartin.control.builds.text import Dialect, Text, read_text

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,255}")
_FLAG = re.compile(r"--([a-z][a-z-]*)(?:=(.*))?", re.DOTALL)
_SECRET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|git@")
_MODE = re.compile(r"0?[0-7]{1,4}")
#: As Docker has them, where Dockerfiles rely on it.
_CHECK_INTERVAL_S, _CHECK_TIMEOUT_S, _CHECK_START_S, _CHECK_RETRIES = 30.0, 30.0, 5.0, 3
_MAX_RETRIES = 10_000

_Step = TypeVar("_Step", bound=plan.Step)


@dataclass(frozen=True)
class Instruction:
    """One instruction: its keyword, and all that follows it."""

    name: str
    keyword: Span
    rest: Span
    escape: str
    #: Where to note what is no error and has no effect.
    notes: list[Note]

    def step(self, kind: type[_Step], **fields: Any) -> _Step:
        """A step that was written here."""
        return kind(position=self.keyword.position, written=self.written, **fields)

    @property
    def written(self) -> str:
        documents = "".join(each.written for each in self.documents)
        return self.keyword.line.text + (f"\n{documents}" if documents else "")

    @property
    def documents(self) -> tuple[Document, ...]:
        return self.keyword.line.documents

    @property
    def dialect(self) -> Dialect:
        return Dialect(escape=self.escape, quotes=True, operators=True)

    def text(self, span: Span) -> Text:
        return read_text(span, self.dialect)

    def flags(self, *known: str) -> tuple[dict[str, Span], Span]:
        """The flags, each given at most once, and what follows them. Raises InvalidBuild."""
        found: dict[str, Span] = {}
        every, rest = self.all_flags(*known)
        for name, value in every:
            if name in found:
                raise value.error(f"is a second --{name}")
            found[name] = value
        return found, rest

    def all_flags(self, *known: str) -> tuple[list[tuple[str, Span]], Span]:
        """The flags in their order, and what follows them."""
        found: list[tuple[str, Span]] = []
        rest = self.rest
        while rest.text.startswith("--"):
            word, rest = rest.first_word()
            flag = _FLAG.fullmatch(word.text)
            if flag is None or flag[1] not in known:
                raise word.error(
                    f"is a flag of {self.name} that is not supported",
                    hint=f"known are {', '.join(f'--{each}' for each in known)}"
                    if known
                    else f"{self.name} takes no flags",
                )
            at = 2 + len(flag[1])
            found.append((flag[1], word.part(min(at + 1, len(word.text)), len(word.text))))
        return found, rest

    def needs(self, rest: Span) -> Span:
        """`rest`, which must not be empty."""
        if not rest.text:
            raise self.keyword.error("has nothing after it")
        return rest


def read_step(instruction: Instruction) -> plan.AnyStep | None:
    """The step that it is; None for one that has no effect, of which a note is made.

    Raises InvalidBuild.
    """
    if (reason := _WITHOUT_EFFECT.get(instruction.name)) is not None:
        instruction.notes.append(Note(instruction.keyword.position, reason))
        return None
    if (refusal := _REFUSED.get(instruction.name)) is not None:
        raise instruction.keyword.error("is not supported", hint=refusal)
    reader = _READERS.get(instruction.name)
    if reader is None:
        raise instruction.keyword.error(
            "is no instruction", hint=f"known are FROM, ARG, {', '.join(sorted(_READERS))}"
        )
    return reader(instruction)


def pairs(
    instruction: Instruction, *, needs_value: bool = True, any_name: bool = False
) -> list[tuple[Span, Text | None]]:
    """What `NAME=value NAME=value` or, where a value is needed, the old `NAME value` set."""
    rest = instruction.needs(instruction.rest)
    words = rest.quoted_words(instruction.escape)
    if needs_value and "=" not in words[0].text:
        name, value = rest.first_word()
        if not value.text:
            raise name.error("has no value", hint=f"write {instruction.name} NAME=VALUE")
        return [(_name(name, any_name), instruction.text(value))]
    found: list[tuple[Span, Text | None]] = []
    for word in words:
        name, value_or_none = word.partition("=")
        if value_or_none is None and needs_value:
            raise word.error(
                "has no value", hint="write NAME=VALUE, and quotes around a value with blanks"
            )
        text = None if value_or_none is None else instruction.text(value_or_none)
        found.append((_name(name, any_name), text))
    return found


def _name(word: Span, any_name: bool) -> Span:
    if any_name and word.text:
        return word
    if not _VARIABLE.fullmatch(word.text):
        raise word.error("is no name of a variable", hint="use letters, digits and underscores")
    return word


def _command(instruction: Instruction, rest: Span) -> plan.Command:
    words = rest.json_words()
    if words is None:
        return plan.Command(line=instruction.needs(rest).text)
    return plan.Command(words=words)


def _run(instruction: Instruction) -> plan.Run:
    flags, rest = instruction.all_flags("mount", "network")
    secrets: list[plan.Secret] = []
    for name, value in flags:
        if name == "network":
            if value.text != "default":
                raise value.error("is a network that is not supported", hint="leave it out")
            continue
        secret = _mount(value, instruction.notes)
        secrets += [secret] if secret is not None else []
    return instruction.step(
        plan.Run,
        command=_run_command(instruction, rest),
        secrets=tuple(secrets),
    )


def _run_command(instruction: Instruction, rest: Span) -> plan.Command:
    documents = instruction.documents
    if not documents:
        command = _command(instruction, rest)
        if rest.text.startswith("[") and not command.words and rest.json_words() is not None:
            raise rest.error("is an empty command")
        return command
    if len(documents) == 1 and len(rest.words()) == 1:
        return plan.Command(line=documents[0].content.text, is_script=True)
    # The shell reads them by the same rules, so it gets them as they are.
    return plan.Command(line="\n".join([rest.text, "".join(d.written for d in documents)]))


def _mount(value: Span, notes: list[Note]) -> plan.Secret | None:
    fields: dict[str, Span] = {}
    left: Span | None = value
    while left is not None:
        item, left = left.partition(",")
        key, content = item.partition("=")
        fields[key.text] = content or key.part(len(key.text), len(key.text))
    kind = fields.pop("type").text if "type" in fields else "bind"
    if kind == "cache":
        notes.append(
            Note(value.position, "a cache mount is an ordinary directory, and is kept in the image")
        )
        return None
    if kind != "secret":
        raise value.error(
            f"is a mount of type {quoted(kind)}, which is not supported",
            hint="use COPY for files; type=secret and type=cache are known",
        )
    return _secret(value, fields)


def _secret(value: Span, fields: dict[str, Span]) -> plan.Secret:
    known = ("id", "target", "dst", "destination", "env", "required", "mode", "uid", "gid")
    for key, content in fields.items():
        if key not in known:
            raise content.error(f"belongs to {quoted(key)}, which a secret mount does not know")
    target = next((fields[key].text for key in known[1:4] if key in fields), "")
    name = fields["id"].text if "id" in fields else target.rpartition("/")[2]
    if not _SECRET.fullmatch(name):
        raise value.error("names no secret", hint="write --mount=type=secret,id=NAME")
    variable = fields["env"].text if "env" in fields else ""
    if "env" in fields:
        _name(fields["env"], any_name=False)
    required = "required" in fields and fields["required"].text.lower() in ("", "true", "1")
    return plan.Secret(
        name=name,
        target=target or ("" if variable else f"/run/secrets/{name}"),
        variable=variable,
        required=required,
        mode=read_mode(fields["mode"]) if "mode" in fields else 0o400,
        uid=number(fields["uid"]) if "uid" in fields else 0,
        gid=number(fields["gid"]) if "gid" in fields else 0,
    )


def read_mode(span: Span) -> int:
    """Permission bits, written in octal. Raises InvalidBuild."""
    if not _MODE.fullmatch(span.text):
        raise span.error("is no mode", hint="write it in octal, such as 755")
    return int(span.text, 8)


def number(span: Span, most: int = 2**31 - 1) -> int:
    """A number that is not negative. Raises InvalidBuild."""
    if not (span.text.isascii() and span.text.isdigit()) or len(span.text) > 10:
        raise span.error("is no number")
    if int(span.text) > most:
        raise span.error("is too large", hint=f"{most} is the most")
    return int(span.text)


def _copy(instruction: Instruction) -> plan.Copy:
    is_add = instruction.name == "ADD"
    known = ("chown", "chmod", "link") if is_add else ("from", "chown", "chmod", "link")
    flags, rest = instruction.flags(*known)
    texts = _paths(instruction, rest)
    documents = {document.position: document for document in instruction.documents}
    inline = [
        _inline(documents[text.position], instruction)
        for text in texts[:-1]
        if text.position in documents
    ]
    kept = [text for text in texts[:-1] if text.position not in documents]
    origin: plan.Origin = plan.Context()
    if "from" in flags:
        # Or an image: whoever knows the stages knows which.
        origin = plan.FromStage(instruction.needs(flags["from"]).text)
        if inline:
            raise flags["from"].error("cannot be together with a heredoc")
    return instruction.step(
        plan.Copy,
        sources=tuple(kept),
        destination=texts[-1],
        origin=origin,
        inline=tuple(inline),
        owner=instruction.text(flags["chown"]) if "chown" in flags else None,
        mode=read_mode(flags["chmod"]) if "chmod" in flags else None,
        is_add=is_add,
    )


def _paths(instruction: Instruction, rest: Span) -> list[Text]:
    """The sources and the destination."""
    listed = rest.json_words()
    if listed is None:
        words = rest.words()
    else:
        words = [Span(rest.line, rest.start, each) for each in listed]
    if len(words) < 2:
        raise instruction.keyword.error(
            "needs a source and a destination", hint=f"write {instruction.name} SOURCE... DEST"
        )
    if instruction.name == "ADD":
        for word in words[:-1]:
            refuse_address(word.text, word.position)
    return [instruction.text(word) for word in words]


def refuse_address(source: str, position: Position) -> None:
    """Refuse an ADD of what is elsewhere."""
    if _ADDRESS.match(source):
        raise InvalidBuild(
            f"ADD of an address, {quoted(source)}, is not supported",
            position=position,
            text=source,
            hint="download it with RUN curl, and check what came",
        )


def _inline(document: Document, instruction: Instruction) -> plan.Inline:
    if "/" in document.name or document.name in (".", ".."):
        raise instruction.keyword.error(
            f"has a heredoc named {quoted(document.name)}, which is no name of a file"
        )
    content = document.content.whole
    if not document.expands:
        return plan.Inline(document.name, Text.literal(content.text, document.position))
    dialect = Dialect(escape=instruction.escape, operators=True)
    return plan.Inline(document.name, read_text(content, dialect))


def _env(instruction: Instruction) -> plan.Env:
    return instruction.step(
        plan.Env,
        pairs=tuple((name.text, value) for name, value in pairs(instruction) if value is not None),
    )


def _label(instruction: Instruction) -> plan.Label:
    found = pairs(instruction, any_name=True)
    return instruction.step(
        plan.Label,
        pairs=tuple((name.text.strip("\"'"), value) for name, value in found if value is not None),
    )


def _workdir(instruction: Instruction) -> plan.Workdir:
    return instruction.step(
        plan.Workdir,
        path=instruction.text(instruction.needs(instruction.rest)),
    )


def _user(instruction: Instruction) -> plan.User:
    return instruction.step(
        plan.User,
        name=instruction.text(instruction.needs(instruction.rest)),
    )


def _expose(instruction: Instruction) -> plan.Expose:
    words = instruction.needs(instruction.rest).words()
    return instruction.step(
        plan.Expose,
        ports=tuple(instruction.text(word) for word in words),
    )


def _shell(instruction: Instruction) -> plan.Shell:
    words = instruction.rest.json_words()
    if not words:
        raise instruction.keyword.error(
            "needs a list", hint='write SHELL ["/bin/bash", "-c"], with double quotes'
        )
    return instruction.step(plan.Shell, words=words)


def _started(instruction: Instruction) -> plan.Command | None:
    command = _command(instruction, instruction.rest)
    return command if command.words or command.line else None


def _cmd(instruction: Instruction) -> plan.Cmd:
    return instruction.step(plan.Cmd, command=_started(instruction))


def _entrypoint(instruction: Instruction) -> plan.Entrypoint:
    return instruction.step(plan.Entrypoint, command=_started(instruction))


def _healthcheck(instruction: Instruction) -> plan.Healthcheck:
    known = ("interval", "timeout", "start-period", "start-interval", "retries")
    flags, rest = instruction.flags(*known)
    word, command = rest.first_word()
    check: plan.Check | None = None
    if word.text.upper() == "CMD":
        check = plan.Check(
            command=_command(instruction, instruction.needs(command)),
            interval_s=_time(flags, "interval", _CHECK_INTERVAL_S),
            timeout_s=_time(flags, "timeout", _CHECK_TIMEOUT_S),
            start_period_s=_time(flags, "start-period", 0.0),
            start_interval_s=_time(flags, "start-interval", _CHECK_START_S),
            retries=number(flags["retries"], _MAX_RETRIES) or _CHECK_RETRIES
            if "retries" in flags
            else _CHECK_RETRIES,
        )
        if not (check.command.words or check.command.line):
            raise command.error("is an empty command")
    elif word.text.upper() != "NONE" or command.text or flags:
        raise instruction.keyword.error(
            "is neither NONE nor CMD", hint="write HEALTHCHECK [--interval=30s] CMD command"
        )
    return instruction.step(plan.Healthcheck, check=check)


def _time(flags: dict[str, Span], name: str, default: float) -> float:
    """What a flag says; 0 is the default, as Docker has it."""
    return (flags[name].duration_s() if name in flags else 0.0) or default


_READERS: dict[str, Callable[[Instruction], plan.AnyStep]] = {
    "ADD": _copy,
    "CMD": _cmd,
    "COPY": _copy,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "HEALTHCHECK": _healthcheck,
    "LABEL": _label,
    "RUN": _run,
    "SHELL": _shell,
    "USER": _user,
    "WORKDIR": _workdir,
}
_WITHOUT_EFFECT = {
    "STOPSIGNAL": "STOPSIGNAL has no effect: a sandbox is stopped as a machine",
    "VOLUME": "VOLUME has no effect: all of a sandbox's disk is kept",
    "MAINTAINER": "MAINTAINER has no effect: use LABEL",
}
_REFUSED = {"ONBUILD": "write the steps where they are to be done"}
