"""What the two ends of mutual TLS between control plane and agents have in common.

Always TLS 1.3, always both certificates, each from the one issuer that is accepted. A certificate
can be replaced while a context is in use: what connects from then on is shown the new one.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A certificate and its private key, as PEM."""

    certificate: str
    key: str = field(repr=False)


#: Whether the peer of this name may have the certificate with this serial number.
Accepts = Callable[[str, int], bool]


def agents_context(identity: Identity, issuer: str) -> ssl.SSLContext:
    """How an agent serves: every client has a certificate of `issuer`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # A resumed session would be taken without looking at its certificate again.
    context.num_tickets = 0
    _demand(context, identity, issuer)
    return context


def controls_context(identity: Identity, issuer: str, accepts: Accepts) -> ssl.SSLContext:
    """How the control plane connects: to who has a certificate of `issuer` for the name asked for.

    What `accepts` refuses is refused before anything is sent.
    """
    context = _ControlsContext(ssl.PROTOCOL_TLS_CLIENT)
    context.accepts = accepts
    context.sslobject_class = _CheckedConnection
    _demand(context, identity, issuer)
    return context


def show(context: ssl.SSLContext, identity: Identity) -> None:
    """Use this certificate from now on."""
    # The library reads files alone; this one is in memory, and ours alone.
    handle = os.memfd_create("identity", os.MFD_CLOEXEC)
    with os.fdopen(handle, "w") as file:
        file.write(identity.certificate + identity.key)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{handle}")


def _demand(context: ssl.SSLContext, identity: Identity, issuer: str) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=issuer)
    show(context, identity)


class _ControlsContext(ssl.SSLContext):
    accepts: Accepts


class _CheckedConnection(ssl.SSLObject):
    def do_handshake(self) -> None:
        super().do_handshake()
        certificate = self.getpeercert() or {}
        serial = int(str(certificate.get("serialNumber", "0")), 16)
        context = self.context
        assert isinstance(context, _ControlsContext)
        if not context.accepts(self.server_hostname or "", serial):
            raise ssl.SSLCertVerificationError("the certificate was revoked")
