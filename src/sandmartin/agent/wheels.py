"""Python packages of an image, fetched by this host's pip and installed in the image by its own.

So they come from wherever this host has its packages, and nothing of how it gets them is in the
image. Every file is verified by the hashes in the image's lock.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sandmartin.agent import proc
from sandmartin.errors import ToolFailed

#: Of the suite that images are made of.
_PYTHON, _GLIBC_MINOR = "3.11", 36
#: The first glibc that wheels can be built for, and an older name for it.
_OLDEST_MINOR, _OLDEST_NAME = 17, "manylinux2014_x86_64"
_DEADLINE_S = 1200.0
#: What tells pip where packages are, beside its own files.
_ENVIRONMENT = ("PIP_", "HTTP_", "HTTPS_", "NO_PROXY", "SSL_", "REQUESTS_", "XDG_CONFIG_HOME")


async def fetch(lock: Path, into: Path) -> None:
    """Put the wheels of a lock into a directory. Raises ToolFailed."""
    minors = range(_GLIBC_MINOR, _OLDEST_MINOR - 1, -1)
    platforms = [*(f"manylinux_2_{minor}_x86_64" for minor in minors), _OLDEST_NAME]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--only-binary=:all:", "--no-deps", "--require-hashes", f"--dest={into}"]
    command += [f"--python-version={_PYTHON}", "--implementation=cp"]
    command += [f"--platform={each}" for each in platforms]
    env = {n: v for n, v in os.environ.items() if n.upper().startswith(_ENVIRONMENT)}
    try:
        await proc.run([*command, f"--requirement={lock}"], env=env, deadline_s=_DEADLINE_S)
    except ToolFailed as error:
        raise ToolFailed(
            error.message, hint="the Python package index must be reachable; run setup again"
        ) from error
