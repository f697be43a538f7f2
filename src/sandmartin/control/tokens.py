"""Tokens of sandboxes: derived from the platform's key, kept nowhere, the same at all replicas.

Each sandbox has its own, a fork too, for as long as it lives. The access token opens the guest
agent and signs the addresses of files; the traffic token opens the ports of a private sandbox.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from functools import lru_cache

from sandmartin.control.seal import Sealer

_PURPOSE = "sandbox tokens"
#: Of which the tokens are remembered: a stranger's token is compared with all that run.
_MAX_REMEMBERED = 16 * 1024


class Tokens:
    """The tokens of all sandboxes."""

    def __init__(self, sealer: Sealer) -> None:
        self._key = sealer.derive(_PURPOSE)
        self._derived = lru_cache(_MAX_REMEMBERED)(self._derive)

    def access(self, sandbox_id: str) -> str:
        """What the guest agent's port asks for; 64 hexadecimal digits."""
        return self._derived("access", sandbox_id)

    def traffic(self, sandbox_id: str) -> str:
        """What the ports of a private sandbox ask for; 64 hexadecimal digits."""
        return self._derived("traffic", sandbox_id)

    def _derive(self, purpose: str, sandbox_id: str) -> str:
        text = f"{purpose}:{sandbox_id}".encode()
        return hmac.digest(self._key, text, hashlib.sha256).hex()

    def is_access(self, sandbox_id: str, given: bytes) -> bool:
        """Whether it is the access token, compared in constant time."""
        return hmac.compare_digest(self.access(sandbox_id).encode(), given)

    def is_traffic(self, sandbox_id: str, given: bytes) -> bool:
        """Whether it is the traffic token, compared in constant time."""
        return hmac.compare_digest(self.traffic(sandbox_id).encode(), given)

    def signature(
        self, sandbox_id: str, path: str, operation: str, user: str = "", expires: str = ""
    ) -> str:
        """What makes the address of a file valid without a token: `v1_…`.

        `operation` is `read` or `write`, `expires` a time in seconds since the epoch or empty.
        """
        parts = [path, operation, user, self.access(sandbox_id), *([expires] if expires else [])]
        text = ":".join(parts).encode("utf-8", "surrogateescape")
        return "v1_" + base64.b64encode(hashlib.sha256(text).digest()).decode().rstrip("=")
