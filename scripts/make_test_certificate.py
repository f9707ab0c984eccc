"""Make a certificate chain for trying out content credentials: a root and a leaf that may sign, valid for a year.

    python scripts/make_test_certificate.py FOLDER

writes chain.pem (for C2PA_CERT), key.pem (for C2PA_KEY) and root.pem. Nobody trusts such a root: programs that check
credentials will say so. For films that leave the house, a certificate comes from an authority.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = timedelta(days=1)


def name(common: str) -> x509.Name:
    """A distinguished name for tests."""
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test only"),
                      x509.NameAttribute(NameOID.COMMON_NAME, common)])


def usage(*, signs: bool, issues: bool) -> x509.KeyUsage:
    """What a key may do: sign documents, or issue certificates."""
    return x509.KeyUsage(digital_signature=signs, key_cert_sign=issues, crl_sign=issues, content_commitment=False,
                         key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
                         decipher_only=False)


def certificate(subject: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Name, signer: ec.EllipticCurvePrivateKey,
                days: tuple[int, int], root: bool) -> x509.Certificate:
    """One certificate, valid between `days` counted from now."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder().subject_name(name(subject)).issuer_name(issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now + days[0] * DAY)
        .not_valid_after(now + days[1] * DAY)
        .add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
        .add_extension(usage(signs=not root, issues=root), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False))
    if not root:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(signer, hashes.SHA256())


def make(folder: Path, days: tuple[int, int] = (-1, 365)) -> tuple[Path, Path]:
    """Write chain.pem, key.pem and root.pem; returns the first two."""
    folder.mkdir(parents=True, exist_ok=True)
    root_key, leaf_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = certificate("Test root", root_key, name("Test root"), root_key, (-30, 3650), root=True)
    leaf = certificate("Test signer", leaf_key, root.subject, root_key, days, root=False)
    pem = serialization.Encoding.PEM
    (folder / "root.pem").write_bytes(root.public_bytes(pem))
    chain, key = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(leaf.public_bytes(pem) + root.public_bytes(pem))
    key.touch(mode=0o600)
    key.write_bytes(leaf_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return chain, key


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/make_test_certificate.py FOLDER")
    for path in make(Path(sys.argv[1])):
        print(path)
