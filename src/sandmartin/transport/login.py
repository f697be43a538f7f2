"""The stored login: a control plane and a key for it, in a file that its user alone may read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sandmartin.errors import Invalid

_HINT = "log in again: sandmartin login"


@dataclass(frozen=True, kw_only=True)
class Login:
    """Where one is logged in."""

    url: str
    api_key: str = field(repr=False)
    #: Of a key that was made by logging in, and so goes with logging out.
    key_id: str = ""


def login_file(environ: Mapping[str, str] | None = None) -> Path | None:
    """Where the login is stored; None for a user without a home."""
    environ = os.environ if environ is None else environ
    if given := environ.get("XDG_CONFIG_HOME"):
        return Path(given) / "sandmartin" / "login.json"
    try:
        return Path.home() / ".config" / "sandmartin" / "login.json"
    except RuntimeError:
        return None


def stored_login(file: Path | None) -> Login | None:
    """The login in `file`, None when there is none. Raises Invalid."""
    if file is None:
        return None
    try:
        return Login(**json.loads(file.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Invalid(f"{file} cannot be read: {error.strerror}", hint=_HINT) from error
    except (ValueError, TypeError, RecursionError) as error:
        # Without the cause's words, which may be of the content.
        raise Invalid(f"{file} holds no login", hint=_HINT) from error


def store_login(file: Path | None, login: Login) -> Path:
    """Keep `login` in `file`, and the file from others. Raises Invalid."""
    if file is None:
        raise Invalid("you have no home directory to keep a login in", hint="set XDG_CONFIG_HOME")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Readable by its owner alone from the first moment on.
        number, beside = tempfile.mkstemp(dir=file.parent, prefix=".login-")
        try:
            with os.fdopen(number, "w") as stream:
                json.dump(asdict(login), stream)
            Path(beside).replace(file)
        except BaseException:
            with suppress(OSError):
                Path(beside).unlink()
            raise
    except OSError as error:
        raise Invalid(f"{file} cannot be written: {error.strerror}") from error
    return file


def forget_login(file: Path | None) -> None:
    """Raises Invalid."""
    if file is None:
        return
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise Invalid(f"{file} cannot be removed: {error.strerror}") from error
