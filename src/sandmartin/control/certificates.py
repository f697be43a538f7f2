"""Certificates for names below `localhost`, so that clients reach sandboxes by name over TLS.

An issuer is made for one name and forgotten: what it signed is all that it ever signs, and it is
good for nothing outside its name.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sandmartin.control.x509 import blank, key_pem, pem, usage
from sandmartin.errors import Invalid
from sandmartin.model import check_name

_LIFE_S = 825 * 86400.0


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """An issuer and what it has signed, as PEM."""

    domain: str
    issuer: str
    certificate: str
    key: str = field(repr=False)

    @classmethod
    def make(cls, name: str) -> Certificates:
        """For `NAME.localhost` and all names right below it. Raises Invalid."""
        check_name(name, "name")
        if not all(label.strip("-") == label and label for label in name.split(".")) or "_" in name:
            raise Invalid(f"{name!r} is no host name", hint="use letters, digits and dashes")
        domain, now = f"{name}.localhost", time.time()
        issuer_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        subject = _name(f"Sandmartin {domain}")
        identifier = x509.SubjectKeyIdentifier.from_public_key(issuer_key.public_key())
        issuer = (
            blank(subject, subject, issuer_key.public_key(), now, _LIFE_S)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
            .add_extension(usage(signs_certificates=True), True)
            .add_extension(x509.NameConstraints([x509.DNSName(domain)], None), True)
            .add_extension(identifier, False)
            .sign(issuer_key, hashes.SHA256())
        )
        names = [x509.DNSName(domain), x509.DNSName(f"*.{domain}")]
        known = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
        certificate = (
            blank(_name(domain), subject, key.public_key(), now, _LIFE_S)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
            .add_extension(usage(signs_certificates=False), True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
            .add_extension(x509.SubjectAlternativeName(names), False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(known, False)
            .sign(issuer_key, hashes.SHA256())
        )
        return cls(
            domain=domain, issuer=pem(issuer), certificate=pem(certificate), key=key_pem(key)
        )

    def write(self, directory: Path) -> dict[str, Path]:
        """Write them to `issuer.pem`, `cert.pem` and `key.pem`, the last for us alone."""
        directory.mkdir(parents=True, exist_ok=True)
        contents = {"issuer": self.issuer, "cert": self.certificate, "key": self.key}
        files = {name: directory / f"{name}.pem" for name in contents}
        for name, file in files.items():
            beside = file.with_name(f".{file.name}")
            beside.unlink(missing_ok=True)
            mode = 0o600 if name == "key" else 0o644
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(handle, "w") as made:
                made.write(contents[name])
            beside.replace(file)
        return files


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
