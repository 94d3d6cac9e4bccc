"""How is a hub without a domain name encrypted? By a certificate of its own, whose fingerprint is in every link.

The link is handed over by a person, so there is no trust on first use: a worker accepts exactly this certificate.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from potluck.settings import write_private


@dataclass(frozen=True)
class Certificate:
    certificate: Path
    key: Path
    fingerprint: str  # SHA-256 of the DER form, hexadecimal


def load_or_make(folder: Path, bind: str) -> Certificate:
    """The hub's certificate; made at the first start and kept, so that links stay valid."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    certificate, key = folder / "hub.crt", folder / "hub.key"
    if not (certificate.exists() and key.exists()):
        _make(certificate, key, bind)
    der = x509.load_pem_x509_certificate(certificate.read_bytes()).public_bytes(serialization.Encoding.DER)
    return Certificate(certificate, key, hashlib.sha256(der).hexdigest())


def _make(certificate: Path, key_path: Path, bind: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "potluck hub")])
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    try:
        names.append(x509.IPAddress(ipaddress.ip_address(bind)))
    except ValueError:
        names.append(x509.DNSName(socket.gethostname()))
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))  # clocks of guests are often behind
        .not_valid_after(now + dt.timedelta(days=3650))
        .add_extension(x509.SubjectAlternativeName(list(dict.fromkeys(names))), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_private(key_path, pem.decode())
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
