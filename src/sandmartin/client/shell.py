"""What of a tree the file calls cannot do, done by `xargs`, `chmod`, `ln` and `readlink` inside.

Names go over standard input, each ended by a NUL: none can be taken for an option or be cut.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import groupby

from sandmartin.client.callbacks import Listeners
from sandmartin.client.feed import Feeds
from sandmartin.client.handle import give_all, start
from sandmartin.client.link import Link
from sandmartin.errors import NotStarted, SandmartinError
from sandmartin.transport import Command

_LIMIT_S = 300
_READ_LINKS = 'for each do readlink -n -- "$each"; printf "\\0"; done'


async def set_modes(link: Link, modes: Iterable[tuple[int, str]], user: str) -> None:
    """Set the mode bits of paths, in this order. Raises CommandFailed, NotStarted."""
    for mode, paths in groupby(modes, key=lambda each: each[0]):
        await _run(link, ("chmod", f"{mode:o}", "--"), [path for _, path in paths], user)


async def link_all(link: Link, links: Sequence[tuple[str, str]], user: str) -> None:
    """Make symbolic links, each given by its text and its path; what is there is replaced."""
    words = ("-n", "2", "ln", "-sfn", "--")
    await _run(link, words, [word for each in links for word in each], user)


async def read_links(link: Link, paths: Sequence[str], user: str) -> list[str]:
    """The texts of symbolic links; empty where one cannot be read."""
    try:
        said = await _run(link, ("sh", "-c", _READ_LINKS, "sh"), paths, user)
    except NotStarted:
        return [""] * len(paths)
    texts = [os.fsdecode(each) for each in said.split(b"\0")[:-1]]
    if len(texts) != len(paths):
        raise SandmartinError("the sandbox did not tell where its links lead")
    return texts


async def _run(link: Link, words: tuple[str, ...], names: Sequence[str], user: str) -> bytes:
    """Run `xargs` with `words` on the names; what it said."""
    if not names:
        return b""
    command = Command(cmd="xargs", args=("-0", *words), user=user, stdin=True, timeout_s=_LIMIT_S)
    handle = await start(Feeds(link), command, Listeners())
    await give_all(handle, "".join(f"{name}\0" for name in names))
    return (await handle.wait()).stdout_bytes
