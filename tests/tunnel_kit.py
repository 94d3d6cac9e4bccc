"""The tunnel programs' stand-in on PATH, names that lead to it, and a certificate for them that is trusted here."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NAMES = ("trycloudflare.com", "ngrok-free.app")
RESOLVER = """
import socket
real = socket.getaddrinfo
def getaddrinfo(host, *more, **named):
    name = host.decode() if isinstance(host, bytes) else str(host)
    return real("127.0.0.1" if name.endswith((".trycloudflare.com", ".ngrok-free.app")) else host, *more, **named)
socket.getaddrinfo = getaddrinfo
"""
"""What the world's name servers would do; as a sitecustomize.py, for the processes that a test starts."""


@dataclass(frozen=True)
class Doubles:
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "TUNNEL_DOUBLE": str(self.folder),
            "PYTHONPATH": str(self.folder / "names"),
            "SSL_CERT_FILE": str(self.folder / "cert.pem"),
            "NO_PROXY": "*",
        }

    @property
    def starts(self) -> list[dict[str, Any]]:
        path = self.folder / "starts"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def be(self, mood: str) -> None:
        (self.folder / "mood").write_text(mood)


def install(folder: Path, *programs: str) -> Doubles:
    """Stand-ins for these programs below `folder`."""
    (folder / "bin").mkdir(parents=True)
    double = Path(__file__).with_name("tunnel_double.py")
    for name in programs:
        path = folder / "bin" / name
        path.write_text(
            f"#!{sys.executable}\nimport os, runpy\n"
            f"os.environ['TUNNEL_DOUBLE_NAME'] = {name!r}\n"
            f"runpy.run_path({str(double)!r}, run_name='__main__')\n"
        )
        path.chmod(0o755)
    (folder / "names").mkdir()
    (folder / "names" / "sitecustomize.py").write_text(RESOLVER)
    certify(folder)
    return Doubles(folder)


def use_here(doubles: Doubles, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the test's own process, too."""
    for key, value in doubles.environment.items():
        monkeypatch.setenv(key, value)
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *more: Any, **named: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else str(host)
        return real("127.0.0.1" if name.endswith(NAMES) else host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def certify(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "everybody trusts me here")])
    now = dt.datetime.now(dt.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName(f"*.{name}") for name in NAMES])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=2))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
