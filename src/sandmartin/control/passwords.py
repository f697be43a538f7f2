"""Passwords: argon2 hashes, made off the event loop and few at a time.

Whether somebody is known shows neither in what is answered nor in how long it takes: without a
hash to compare with, one is made.
"""

from __future__ import annotations

import asyncio

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError

from sandmartin.errors import Invalid

_MIN_CHARS = 10
_MAX_CHARS = 256
#: What OWASP recommends for argon2id on one thread.
_TIME_COST = 2
_MEMORY_KIB = 19 * 1024
_AT_ONCE = 2


class Passwords:
    """Hashes and compares."""

    def __init__(self) -> None:
        self._hasher = PasswordHasher(_TIME_COST, _MEMORY_KIB, parallelism=1)
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def hash(self, password: str) -> str:
        """Raises Invalid for one that is too short or too long."""
        if not _MIN_CHARS <= len(password) <= _MAX_CHARS:
            raise Invalid(
                "the password is too short or too long",
                hint=f"use {_MIN_CHARS} to {_MAX_CHARS} characters",
            )
        async with self._turns:
            return await asyncio.to_thread(self._hasher.hash, password)

    async def matches(self, hashed: str | None, password: str) -> bool:
        """Whether it is the password with this hash; never without one."""
        password = password[: _MAX_CHARS + 1]
        async with self._turns:
            if hashed is None:
                await asyncio.to_thread(self._hasher.hash, password)
                return False
            try:
                return await asyncio.to_thread(self._hasher.verify, hashed, password)
            except VerificationError:
                return False
