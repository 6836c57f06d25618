"""A job's own certificate authority, a certificate for each of its hosts, and a token."""

import datetime
import ipaddress
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jaxdist.config.errors import UserError
from jaxdist.transport.credentials import AUTHORITY_FILE, TOKEN_FILE

_EARLIER = datetime.timedelta(hours=1)  # valid since: clocks of hosts differ


def make_certificates(directory: Path, hosts: Sequence[str], days: float) -> list[Path]:
    """Write ca.pem, a HOST.pem (certificate and key) for each host, and token, all readable by the owner alone.

    The authority's key is not kept: nobody can add to the job later, and there is nothing to steal.

    Raises UserError for names that are no host's, and before anything is written over.
    """
    wrong = [host for host in hosts if not _is_name(host)]
    if wrong or not hosts or len(set(hosts)) != len(hosts) or AUTHORITY_FILE in [f"{host}.pem" for host in hosts]:
        what = (
            f"not names of hosts: {', '.join(map(repr, wrong))}" if wrong else "names that differ are needed, not ca"
        )
        raise UserError(f"hosts {','.join(hosts)!r}: {what}; for example --hosts node-0,node-1,10.0.0.3")
    if days <= 0:
        raise UserError(f"days {days:g}: must be above 0")
    files = {directory / AUTHORITY_FILE: b"", directory / TOKEN_FILE: secrets.token_hex(32).encode() + b"\n"}
    files |= {directory / f"{host}.pem": b"" for host in hosts}
    there = [path.name for path in files if path.exists()]
    if there:
        raise UserError(
            f"{directory}: {', '.join(there)} {'is' if len(there) == 1 else 'are'} there already, and a running job "
            "may need them; choose another directory, or remove them first"
        )
    authority_key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"jaxdist job {secrets.token_hex(8)}")])
    authority = (
        _builder(issuer, issuer, authority_key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    files[directory / AUTHORITY_FILE] = authority.public_bytes(serialization.Encoding.PEM)
    for host in hosts:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _builder(subject, issuer, key, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectAlternativeName([_alternative_name(host)]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
            .sign(authority_key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        files[directory / f"{host}.pem"] = certificate.public_bytes(serialization.Encoding.PEM) + private
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, content in files.items():
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error.strerror}") from None
    return list(files)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _is_name(host: str) -> bool:
    characters = host.replace("-", "").replace(".", "").replace("_", "").replace(":", "")
    return 0 < len(host) <= 253 and not host.startswith((".", "-")) and characters.isascii() and characters.isalnum()


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
