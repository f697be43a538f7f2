"""What a connection over TLS costs while nothing passes."""

from __future__ import annotations

from asyncio.sslproto import SSLProtocol

#: Of what is read at once. The library's own measure, 256 KiB, is taken for each end of each
#: connection for as long as it lives.
_READ_BYTES = 32 * 1024


def keep_tls_small() -> None:
    """Have this process's connections over TLS, from now on, take little memory."""
    SSLProtocol.max_size = _READ_BYTES
