"""Content credentials (C2PA): the operator's signer, checked at start; films are signed in a helper process."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import c2pa
from c2pa import C2paError
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from pipeline.errors import SigningFailed
from pipeline.ffmpeg.child import MEMORY_LIMIT
from pipeline.job.control import Control
from pipeline.mark.sign import OFFLINE, native_signer, state_of
from pipeline.settings import BadSetting, Settings
from pipeline.transfer.helper import Helper, HelperFailed

TSA_SEC = 30.0  # of a time-stamp server that accepts and never answers
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


@dataclass(frozen=True)
class Signer:
    """The operator's certificate chain and key (PEM, PKCS#8), the leaf's fingerprint and the time-stamp server."""

    chain: bytes
    key: bytes = field(repr=False)
    algorithm: str
    fingerprint: str
    tsa_url: str | None
    tsa_required: bool

    def sign(self, film: Path, folder: Path, job: dict[str, str], sources: list[dict[str, str]],
             control: Control) -> tuple[Path, dict[str, Any], bool]:
        """The signed film in `folder`, its manifest and whether it holds a time stamp. Raises SigningFailed.

        A try that is given up ends with its process before the next one begins, and each writes a file of its own: no late
        answer of a time-stamp server reaches the film. A process takes about 0.3 s to start.
        """
        if self.tsa_url:
            try:
                return *self._try(film, folder / "stamped.mp4", job, sources, self.tsa_url, control, TSA_SEC), True
            except (HelperFailed, TimeoutError) as e:
                if self.tsa_required:
                    raise SigningFailed("The film could not be signed with a time stamp from C2PA_TSA_URL: the server did not "
                                        "answer properly", stage="postprocessing", reason="time_stamp") from e
        try:
            return *self._try(film, folder / "signed.mp4", job, sources, None, control, math.inf), False
        except HelperFailed as e:
            raise SigningFailed(f"The film could not be signed: {e.message}", stage="postprocessing", reason="c2pa") from e

    def _try(self, film: Path, target: Path, job: dict[str, str], sources: list[dict[str, str]], tsa_url: str | None,
             control: Control, seconds: float) -> tuple[Path, dict[str, Any]]:
        signer = {"algorithm": self.algorithm, "chain": self.chain.decode(), "key": self.key.decode(), "tsa_url": tsa_url}
        request = {"film": str(film.resolve()), "target": str(target.resolve()), "signer": signer, "job": job,
                   "sources": sources}
        with Helper("pipeline.mark.sign", MEMORY_LIMIT) as helper:
            return target, helper.call(request, control, seconds)


def check_signer(settings: Settings) -> Signer | None:
    """The signer the settings name, proven on a picture of one pixel; None where none is named. Raises BadSetting."""
    if not (settings.c2pa_cert and settings.c2pa_key):  # the settings take both or none
        if settings.c2pa_tsa_url:
            raise BadSetting("C2PA_TSA_URL is set without C2PA_CERT and C2PA_KEY: set all, or none")
        return None
    if settings.ai_label == "off":
        raise BadSetting("AI_LABEL=off with C2PA_CERT set: signed credentials state how the film was made; unset one")
    chain = _pem("C2PA_CERT", settings.c2pa_cert)
    leaf, (key, algorithm) = _leaf(chain), _key(_pem("C2PA_KEY", settings.c2pa_key))
    if key.public_key() != leaf.public_key():
        raise BadSetting("C2PA_KEY does not belong to the first certificate of C2PA_CERT")
    # c2pa reads PKCS#8 alone
    pkcs8 = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    signer = Signer(chain, pkcs8, algorithm, leaf.fingerprint(hashes.SHA256()).hex(),
                    settings.c2pa_tsa_url, settings.c2pa_tsa_required)
    _prove(signer)
    return signer


def _prove(signer: Signer) -> None:
    signed = io.BytesIO()
    try:
        with (c2pa.Context.from_dict(OFFLINE) as context,
              native_signer(signer.algorithm, signer.chain.decode(), signer.key.decode(), None) as native,
              c2pa.Builder(json.dumps({"assertions": []}), context) as builder):
            builder.set_intent(c2pa.C2paBuilderIntent.CREATE, c2pa.C2paDigitalSourceType.DIGITAL_CREATION)
            builder.sign(native, "image/png", io.BytesIO(PIXEL), signed)
        signed.seek(0)
        with c2pa.Context.from_dict(OFFLINE) as context, c2pa.Reader("image/png", signed, context=context) as reader:
            state = state_of(reader)
    except C2paError as e:
        state = str(e)
    if state != "valid":
        raise BadSetting(f"C2PA_CERT cannot sign content credentials ({state}): the first certificate must be a leaf with "
                         "digitalSignature and an extended key usage such as emailProtection, followed by its issuers")


def _pem(name: str, value: str) -> bytes:
    if "-----BEGIN" in value:
        return value.replace("\\n", "\n").encode()  # as some consoles pass line breaks
    try:
        return Path(value).read_bytes()
    except OSError as e:
        raise BadSetting(f"{name} is neither PEM text nor a file that can be read ({e.strerror})") from None


def _leaf(pem: bytes) -> x509.Certificate:
    """The chain's first certificate, valid today."""
    try:
        leaf = x509.load_pem_x509_certificates(pem)[0]
    except (ValueError, IndexError):
        raise BadSetting("C2PA_CERT holds no certificate in PEM form") from None
    now = datetime.now(UTC)
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        raise BadSetting(f"C2PA_CERT is valid from {leaf.not_valid_before_utc:%Y-%m-%d} to "
                         f"{leaf.not_valid_after_utc:%Y-%m-%d} only, and today is {now:%Y-%m-%d}")
    return leaf


def _key(pem: bytes) -> tuple[ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey, str]:
    """The key and the name of its algorithm."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BadSetting("C2PA_KEY holds no private key in PEM form, or an encrypted one; give it unencrypted") from None
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES:
        return key, CURVES[key.curve.name]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key, "ed25519"
    if isinstance(key, rsa.RSAPrivateKey):
        return key, "ps256"
    raise BadSetting("C2PA_KEY must be an EC key (P-256, P-384, P-521), Ed25519 or RSA")
