"""The platform's own certificate authority: who is a host, and who is the control plane.

Two issuers that trust each other in nothing. Agents accept only the *control* issuer, the control
plane accepts only the *host* issuer, and checks the host's name. The issuers' keys are sealed in
the database, the same for all replicas. A host's private key never leaves it: it asks with a
request, of which the public key alone is taken. A replica's own certificate lives in memory.
"""

from __future__ import annotations

import hashlib
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from sqlalchemy.exc import IntegrityError

from sandmartin.control import tables
from sandmartin.control.db import Database
from sandmartin.control.seal import Sealer
from sandmartin.control.x509 import blank, key_pem, pem, usage
from sandmartin.errors import Invalid
from sandmartin.tls import Accepts, Identity, controls_context, show

HOST_LIFE_S = 7 * 86400.0
CONTROL_LIFE_S = 86400.0
_ISSUER_LIFE_S = 20 * 365 * 86400.0
_KEPT_AS = "issuers"
_HOST, _CONTROL = "host", "control"
_PURPOSES = {
    _HOST: ExtendedKeyUsageOID.SERVER_AUTH,
    _CONTROL: ExtendedKeyUsageOID.CLIENT_AUTH,
}
_FINGERPRINT_CHARS = 32


def name_of_host(host_id: str) -> str:
    """The name in a host's certificate: none that resolves, and none that an address could be."""
    return f"{host_id}.hosts.sandmartin"


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A certificate, as PEM."""

    certificate: str
    serial: int
    expires_at: float


@dataclass(frozen=True)
class _Issuer:
    """One issuing certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    #: The one side of a connection that its certificates are good for.
    purpose: x509.ObjectIdentifier

    @classmethod
    def make(cls, name: str, now: float) -> _Issuer:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Sandmartin {name} issuer")])
        builder = blank(subject, subject, key.public_key(), now, _ISSUER_LIFE_S)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        builder = builder.add_extension(usage(signs_certificates=True), True)
        own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        made = builder.add_extension(own, False).sign(key, hashes.SHA256())
        return cls(made, key, _PURPOSES[name])

    @property
    def pem(self) -> str:
        return pem(self.certificate)

    def issue(self, name: str, key: ec.EllipticCurvePublicKey, now: float, life_s: float) -> Issued:
        """A certificate for `name`."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = (
            blank(subject, self.certificate.subject, key, now, life_s)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
            .add_extension(usage(signs_certificates=False), True)
            .add_extension(x509.ExtendedKeyUsage([self.purpose]), False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False
            )
            .sign(self.key, hashes.SHA256())
        )
        return Issued(certificate=pem(made), serial=made.serial_number, expires_at=now + life_s)

    def to_json(self) -> dict[str, str]:
        return {"certificate": self.pem, "key": key_pem(self.key)}

    @classmethod
    def from_json(cls, name: str, kept: dict[str, str]) -> _Issuer:
        key = serialization.load_pem_private_key(kept["key"].encode(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        certificate = x509.load_pem_x509_certificate(kept["certificate"].encode())
        return cls(certificate, key, _PURPOSES[name])


class Authority:
    """The issuers, as one replica has them."""

    def __init__(
        self, host: _Issuer, control: _Issuer, owner: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._host = host
        self._control = control
        self._owner = owner
        self._clock = clock

    @classmethod
    async def open(
        cls, db: Database, sealer: Sealer, owner: str, clock: Callable[[], float] = time.time
    ) -> Authority:
        """The authority of this database, made by whoever is first. Raises Invalid."""
        async with db.read() as session:
            row = await session.get(tables.Secret, _KEPT_AS)
        if row is None:
            made = {name: _Issuer.make(name, clock()).to_json() for name in (_HOST, _CONTROL)}
            row = tables.Secret(name=_KEPT_AS, sealed=sealer.seal(made), created_at=clock())
            try:
                async with db.write() as session:
                    session.add(row)
            except IntegrityError:
                # Another replica was faster.
                return await cls.open(db, sealer, owner, clock)
        kept = sealer.unseal(row.sealed)
        host, control = (_Issuer.from_json(name, kept[name]) for name in (_HOST, _CONTROL))
        return cls(host, control, owner, clock)

    @property
    def control_issuer(self) -> str:
        """What agents accept, as PEM."""
        return self._control.pem

    @property
    def fingerprint(self) -> str:
        """Tells an agent that the control issuer it is sent is the one its token was made for."""
        return hashlib.sha256(self.control_issuer.encode()).hexdigest()[:_FINGERPRINT_CHARS]

    def certify_host(self, host_id: str, request: str) -> Issued:
        """A certificate for the key of a host's request (PEM). Raises Invalid."""
        key = _key_of(request)
        return self._host.issue(name_of_host(host_id), key, self._clock(), HOST_LIFE_S)

    def certify_control(self) -> tuple[Identity, float]:
        """A new identity for this replica, and when it expires."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = f"{self._owner}.control.sandmartin"
        made = self._control.issue(name, key.public_key(), self._clock(), CONTROL_LIFE_S)
        return Identity(certificate=made.certificate, key=key_pem(key)), made.expires_at

    def door(self, accepts: Accepts) -> Door:
        """The way from this replica to hosts whose certificates `accepts` knows."""
        return Door(self, self._host.pem, accepts, self._clock)


class Door:
    """How one replica connects to hosts: its own certificate is replaced at half of its life."""

    def __init__(
        self, authority: Authority, issuer: str, accepts: Accepts, clock: Callable[[], float]
    ) -> None:
        self._authority = authority
        self._clock = clock
        identity, expires_at = authority.certify_control()
        self._renew_at = expires_at - CONTROL_LIFE_S / 2
        self._context = controls_context(identity, issuer, accepts)

    @property
    def context(self) -> ssl.SSLContext:
        if self._clock() >= self._renew_at:
            identity, expires_at = self._authority.certify_control()
            self._renew_at = expires_at - CONTROL_LIFE_S / 2
            show(self._context, identity)
        return self._context


def _key_of(request: str) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate request, whose owner has proved to have the private one."""
    try:
        parsed = x509.load_pem_x509_csr(request.encode())
        key = parsed.public_key()
        proved = parsed.is_signature_valid
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise Invalid(
            "the certificate request cannot be read", hint="send PKCS #10 as PEM"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Invalid("the certificate request has another key than one on P-256")
    if not proved:
        raise Invalid("the certificate request is not signed by its own key")
    return key
