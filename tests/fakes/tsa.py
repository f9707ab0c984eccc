"""A small time-stamp authority (RFC 3161 over HTTP) on loopback, with a certificate of its own."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

OID = x509.ObjectIdentifier
SIGNED_DATA, TST_INFO = OID("1.2.840.113549.1.7.2"), OID("1.2.840.113549.1.9.16.1.4")
CONTENT_TYPE, MESSAGE_DIGEST = OID("1.2.840.113549.1.9.3"), OID("1.2.840.113549.1.9.4")
SIGNING_CERTIFICATE = OID("1.2.840.113549.1.9.16.2.47")
SHA256, ECDSA_SHA256, POLICY = OID("2.16.840.1.101.3.4.2.1"), OID("1.2.840.10045.4.3.2"), OID("1.2.3.4.1")


@asn1.sequence
class Algorithm:
    name: OID
    parameters: asn1.Null | None


@asn1.sequence
class Imprint:
    algorithm: Algorithm
    digest: bytes


@asn1.sequence
class Request:
    version: int
    imprint: Imprint
    policy: OID | None
    nonce: int | None
    certificate: Annotated[bool, asn1.Default(False)]


@asn1.sequence
class Statement:
    """TSTInfo."""

    version: int
    policy: OID
    imprint: Imprint
    serial: int
    time: asn1.GeneralizedTime
    nonce: int | None


@asn1.sequence
class OidAttribute:
    name: OID
    values: asn1.SetOf[OID]


@asn1.sequence
class BytesAttribute:
    name: OID
    values: asn1.SetOf[bytes]


@asn1.sequence
class CertificateId:
    digest: bytes  # SHA-256, the default


@asn1.sequence
class SigningCertificate:
    certificates: list[CertificateId]


@asn1.sequence
class CertificateAttribute:
    name: OID
    values: asn1.SetOf[SigningCertificate]


@asn1.sequence
class Attributes:
    """A SET OF in the order that DER asks for."""

    content_type: OidAttribute
    digest: BytesAttribute
    certificate: CertificateAttribute


@asn1.sequence
class Issuer:
    name: asn1.TLV
    serial: int


@asn1.sequence
class SignerInfo:
    version: int
    issuer: Issuer
    digest: Algorithm
    attributes: Annotated[Attributes, asn1.Implicit(0)]
    algorithm: Algorithm
    signature: bytes


@asn1.sequence
class Content:
    kind: OID
    content: Annotated[bytes, asn1.Explicit(0)]


@asn1.sequence
class Certificates:
    leaf: x509.Certificate


@asn1.sequence
class SignedData:
    version: int
    digests: asn1.SetOf[Algorithm]
    content: Content
    certificates: Annotated[Certificates, asn1.Implicit(0)]
    signers: asn1.SetOf[SignerInfo]


@asn1.sequence
class Token:
    kind: OID
    content: Annotated[SignedData, asn1.Explicit(0)]


@asn1.sequence
class Status:
    granted: int


@asn1.sequence
class Answer:
    status: Status
    token: Token


class Routes(http.server.BaseHTTPRequestHandler):
    """One address, for everything."""

    authority: Authority

    def do_POST(self) -> None:
        self.authority.asked += 1
        try:
            body = self.authority.answers(self.rfile.read(int(self.headers.get("content-length") or 0)))
        except (ConnectionError, ValueError):
            return self.send_error(500)
        self.send_response(200)
        self.send_header("Content-Type", "application/timestamp-reply")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Authority:
    """Stamps what it is asked to, at `time` (default: now). `asked` counts the requests of any kind.

    `answers` gives the answer to a request instead of `stamp`; one that raises is a server that fails.
    """

    def __init__(self, time: datetime | None = None) -> None:
        self.time, self.asked, self.closed = time, 0, threading.Event()
        self.answers: Callable[[bytes], bytes] = self.stamp
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = _certificate(self.key)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Routes", (Routes,), {"authority": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Authority:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def down(self, _: bytes) -> bytes:
        """For `answers`: 500."""
        raise ConnectionError("down")

    def hangs(self, _: bytes) -> bytes:
        """For `answers`: none, until the test is over."""
        self.closed.wait()
        raise ConnectionError("closed")

    def stamp(self, request: bytes) -> bytes:
        """The DER answer to a DER request."""
        asked = asn1.decode_der(Request, request)
        now = (self.time or datetime.now(UTC)).replace(microsecond=0)
        statement = asn1.encode_der(Statement(
            version=1, policy=POLICY, imprint=asked.imprint, serial=self.asked, time=asn1.GeneralizedTime(now),
            nonce=asked.nonce))
        attributes = Attributes(
            content_type=OidAttribute(name=CONTENT_TYPE, values=asn1.SetOf([TST_INFO])),
            digest=BytesAttribute(name=MESSAGE_DIGEST, values=asn1.SetOf([hashlib.sha256(statement).digest()])),
            certificate=CertificateAttribute(name=SIGNING_CERTIFICATE, values=asn1.SetOf([SigningCertificate(
                certificates=[CertificateId(digest=self.certificate.fingerprint(hashes.SHA256()))])])))
        signed = b"\x31" + asn1.encode_der(attributes)[1:]  # signed with the tag of a SET, as CMS says
        sha256 = Algorithm(name=SHA256, parameters=None)
        signer = SignerInfo(
            version=1, digest=sha256, attributes=attributes, algorithm=Algorithm(name=ECDSA_SHA256, parameters=None),
            issuer=Issuer(name=asn1.decode_der(asn1.TLV, self.certificate.issuer.public_bytes()),
                          serial=self.certificate.serial_number),
            signature=self.key.sign(signed, ec.ECDSA(hashes.SHA256())))
        data = SignedData(
            version=3, digests=asn1.SetOf([sha256]), content=Content(kind=TST_INFO, content=statement),
            certificates=Certificates(leaf=self.certificate), signers=asn1.SetOf([signer]))
        return asn1.encode_der(Answer(status=Status(granted=0), token=Token(kind=SIGNED_DATA, content=data)))


def _certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """A certificate that may stamp times and do nothing else."""
    subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test only"),
                         x509.NameAttribute(NameOID.COMMON_NAME, "Test time-stamp authority")])
    now = datetime.now(UTC)
    usage = x509.KeyUsage(digital_signature=True, key_cert_sign=False, crl_sign=False, content_commitment=False,
                          key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
                          decipher_only=False)
    return (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=400))
        .not_valid_after(now + timedelta(days=400))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256()))
