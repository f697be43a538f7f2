"""Tokens of sandboxes: made of the platform's key and an id, so that nothing need be kept.

Every replica makes the same ones. Each sandbox, and each of its forks, has its own, for as long as
it is there.
"""

from __future__ import annotations

import hashlib
import hmac

from sandmartin.control.seal import Sealer


class Tokens:
    """Makes the tokens of all sandboxes."""

    def __init__(self, sealer: Sealer) -> None:
        self._key = sealer.key_for("tokens of sandboxes")

    def access(self, sandbox_id: str) -> str:
        """For its commands and files."""
        return self._make("access", sandbox_id)

    def traffic(self, sandbox_id: str) -> str:
        """For its other ports, where they are private."""
        return self._make("traffic", sandbox_id)

    def _make(self, purpose: str, sandbox_id: str) -> str:
        said = f"{purpose}:{sandbox_id}".encode()
        return hmac.new(self._key, said, hashlib.sha256).hexdigest()
