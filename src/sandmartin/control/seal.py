"""Sealing: what must be read again later is kept encrypted, by Fernet (AES-128-CBC, HMAC-SHA256).

The key stands in a file beside the database, or comes from the environment where several replicas
share it; without it what is sealed is lost.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sandmartin.errors import Invalid


class Sealer:
    """Seals and unseals with one key."""

    def __init__(self, key: str) -> None:
        try:
            self._fernet = Fernet(key)
            self._key = base64.urlsafe_b64decode(key)
        except ValueError as error:
            raise Invalid(
                "the secret key is none", hint="use 32 random bytes in URL-safe base64"
            ) from error

    @classmethod
    def open(cls, file: Path) -> Sealer:
        """With the key in `file`, which is made if it is not there."""
        if not file.exists():
            beside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as made:
                made.write(Fernet.generate_key())
                made.flush()
                os.fsync(made.fileno())
            beside.rename(file)
        return cls(file.read_text().strip())

    def derive(self, purpose: str) -> bytes:
        """A key of 32 bytes for another purpose; nothing leads back from it."""
        derivation = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=purpose.encode())
        return derivation.derive(self._key)

    def seal(self, content: Any) -> bytes:
        """Seal what JSON can say."""
        return self._fernet.encrypt(json.dumps(content).encode())

    def unseal(self, sealed: bytes) -> Any:
        """Raises Invalid when it was sealed with another key, or changed."""
        try:
            return json.loads(self._fernet.decrypt(sealed))
        except InvalidToken as error:
            raise Invalid(
                "what was sealed cannot be read", hint="was the secret key changed?"
            ) from error


def digest(secret: str) -> str:
    """What is kept of a random secret that need only be recognised."""
    return hashlib.sha256(secret.encode()).hexdigest()
