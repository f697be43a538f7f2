"""How a template is to be built, as a value: every method gives another one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sandmartin.errors import Invalid
from sandmartin.transport.builds import BuildStep, Script, Steps

#: Far above what a server takes: it says what is too large.
_MAX_SCRIPT_BYTES = 16 << 20
#: Instructions that a Dockerfile may begin with, and a recipe not.
_FIRST_OF_DOCKERFILE = frozenset({"FROM", "ARG"})
StrPath = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a template is to be built: what it starts from, and steps in order.

        app = (
            Template.from_template("base", context="app")
            .copy("server.py", "/srv/")
            .env({"PORT": "8000"})
            .start("python3 /srv/server.py", ready="curl -fs localhost:8000")
        )
        Templates().build(app, name="app")

    Or all of it is a Dockerfile or a recipe. Nothing happens before it is built; it may be built
    as often as one likes, and each method gives another one and leaves this as it is.
    """

    template: str = ""
    image: str = ""
    #: An OCI or docker archive of this machine.
    archive: Path | None = None
    registry: tuple[str, str] | None = field(default=None, repr=False)
    #: The directory that files are copied from.
    context: Path = Path()
    source: Script | Steps = field(default_factory=Steps)

    @classmethod
    def from_template(cls, name: str = "base", *, context: StrPath = ".") -> Template:
        """Start from a template of the team or of the platform: `NAME` or `NAME:TAG`."""
        return cls(template=name, context=Path(context))

    @classmethod
    def from_image(
        cls, reference: str, *, username: str = "", password: str = "", context: StrPath = "."
    ) -> Template:
        """Start from an image of a registry, for instance `docker.io/library/debian:12`."""
        registry = _registry(username, password)
        return cls(image=reference, registry=registry, context=Path(context))

    @classmethod
    def from_archive(cls, file: StrPath, *, context: StrPath = ".") -> Template:
        """Start from an OCI or docker archive, a file that for instance `docker save` wrote."""
        return cls(archive=Path(file), context=Path(context))

    @classmethod
    def from_dockerfile(
        cls,
        file: StrPath = "Dockerfile",
        *,
        context: StrPath | None = None,
        username: str = "",
        password: str = "",
    ) -> Template:
        """All of it is a Dockerfile; the context is its directory unless one is given.

        `username` and `password` are for the registry of its images. Raises Invalid when the file
        cannot be read.
        """
        path = Path(file)
        return cls(
            source=Script(kind="dockerfile", text=_read(path), file=path.name),
            registry=_registry(username, password),
            context=path.parent if context is None else Path(context),
        )

    @classmethod
    def from_recipe(
        cls,
        file: StrPath,
        *,
        template: str = "",
        image: str = "",
        context: StrPath | None = None,
        username: str = "",
        password: str = "",
    ) -> Template:
        """All of it is a recipe, on a template (`base` unless told) or on an image.

        Otherwise as `from_dockerfile`.
        """
        path = Path(file)
        return cls(
            source=Script(kind="recipe", text=_read(path), file=path.name),
            template=template or ("" if image else "base"),
            image=image,
            registry=_registry(username, password),
            context=path.parent if context is None else Path(context),
        )

    # Steps.

    def run(self, command: str | Sequence[str], *, user: str = "") -> Template:
        """Run a command, which must exit 0; a text is for the shell, words are as they are."""
        line = command if isinstance(command, str) else shlex.join(command)
        return self._then("RUN", line, *([user] if user else []))

    def copy(
        self,
        source: StrPath | Sequence[StrPath],
        destination: str,
        *,
        user: str = "",
        mode: int | None = None,
    ) -> Template:
        """Copy files of the context, which may be patterns; of a directory its content.

        They belong to the user of the steps unless another is named; `mode` is for all of them.
        """
        sources = [source] if isinstance(source, str | os.PathLike) else source
        made = self
        for each in sources:
            octal = "" if mode is None else f"{mode:04o}"
            made = made._then("COPY", os.fspath(each), destination, user, octal)
        return made

    def env(self, variables: Mapping[str, str]) -> Template:
        """Set variables of all later steps and of the sandboxes."""
        pairs = [word for pair in variables.items() for word in pair]
        return self._then("ENV", *pairs) if pairs else self

    def workdir(self, path: str) -> Template:
        """Set the directory of later steps and of the sandboxes; it is made."""
        return self._then("WORKDIR", path)

    def user(self, name: str, *, create: bool = False) -> Template:
        """Set the user of later steps and of the sandboxes.

        With `create` the account is made if it is missing, with sudo that asks for no password.
        """
        return self._then("USER", name, *(["true"] if create else []))

    def start(self, command: str, *, ready: str = "") -> Template:
        """Leave a command running at the end: sandboxes begin with it running.

        The template is made once the command `ready` exits 0.
        """
        steps = replace(self._steps, start_cmd=command)
        return replace(self, source=replace(steps, ready_cmd=ready or steps.ready_cmd))

    def ready(self, command: str) -> Template:
        """Make the template once this command exits 0."""
        return replace(self, source=replace(self._steps, ready_cmd=command))

    def no_cache(self) -> Template:
        """Do the step before this, and all that follow it, anew each time."""
        steps = self._steps.steps
        if not steps:
            raise Invalid("there is no step yet", hint="build it with no_cache=True instead")
        forced = (*steps[:-1], replace(steps[-1], force=True))
        return replace(self, source=replace(self._steps, steps=forced))

    def _then(self, word: str, *args: str) -> Template:
        steps = (*self._steps.steps, BuildStep(word, args))
        return replace(self, source=replace(self._steps, steps=steps))

    @property
    def _steps(self) -> Steps:
        if isinstance(self.source, Script):
            raise Invalid(
                f"{self.source.file} is all of this template, and takes no further steps",
                hint="write them into the file, or build a second template on the first",
            )
        return self.source


def _registry(username: str, password: str) -> tuple[str, str] | None:
    return (username, password) if username or password else None


def is_dockerfile(text: str) -> bool:
    """Whether a text is a Dockerfile rather than a recipe, by its first instruction."""
    for line in text.splitlines():
        words = line.split()
        if words and not words[0].startswith("#"):
            return words[0].upper() in _FIRST_OF_DOCKERFILE
    return False


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_SCRIPT_BYTES:
            raise Invalid(f"{path} is too large to be a Dockerfile or a recipe")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Invalid(f"{path} is no text in UTF-8") from error
