"""Where a request goes: the path as it was written, and routes that are for the host alone."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from sandmartin.errors import Invalid

#: The guest agent's port.
GUEST_PORT = 49983
#: The code interpreter's.
INTERPRETER_PORT = 49999
MAX_PORT = 65535
#: Routes of the guest agent that nobody but its host may use, of this release and of others'.
_CONTROL = frozenset(
    {b"init", b"freeze", b"unfreeze", b"collapse", b"fsfreeze", b"fsthaw", b"upgrade", b"tunnel"}
)
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(/.*)?", re.IGNORECASE | re.DOTALL)
_WORD = re.compile(rb"[a-z]*")
_MAX_ENCODINGS = 4


def path_of(raw_path: bytes, host: bytes) -> bytes:
    """The path of a request's target, as it was written.

    Raises Invalid when it is none, or names another host than the request does.
    """
    if raw_path.startswith(b"/"):
        return raw_path
    if (match := _ABSOLUTE.fullmatch(raw_path)) is not None and match[1].lower() == host.lower():
        return match[2] or b"/"
    raise Invalid("the target of the request is no path on its host")


def is_control_route(path: bytes) -> bool:
    """Whether a guest agent might take it for one of its control routes."""
    for _ in range(_MAX_ENCODINGS):
        if (decoded := unquote_to_bytes(path)) == path:
            break
        path = decoded
    else:
        # Nobody means well who encodes a path so often.
        return True
    segments: list[bytes] = []
    for segment in path.replace(b"\\", b"/").split(b"/"):
        if segment == b"..":
            segments = segments[:-1]
        elif segment not in {b"", b"."}:
            segments.append(segment)
    if not segments:
        return False
    word = _WORD.match(segments[0].lower().strip())
    return word is not None and word[0] in _CONTROL
