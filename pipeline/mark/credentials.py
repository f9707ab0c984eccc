"""Content credentials (C2PA): the operator's signer, checked at start, and the signing of films with their sources."""

from __future__ import annotations

import base64
import io
import json
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
from pipeline.job.control import Control
from pipeline.settings import BadSetting, Settings
from pipeline.transfer.interruptible import leaving

# neither a source's credentials nor a certificate may make the worker call an address of their choice
# and a film is hashed piece by piece and its copies lie in a file: by default c2pa holds both in memory, up to 512 MB
OFFLINE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
           "core": {"backing_store_memory_threshold_in_mb": 4, "merkle_tree_chunk_size_in_kb": 4096}}
TRUST = "signingCredential.untrusted"  # no list of trusted authorities is kept here; all else must be valid
BUFFER = 1 << 20  # bytes; c2pa asks for 8 kB at a time
TSA_SEC = 30.0  # of a time-stamp server that accepts and never answers
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
PREFIXES = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"), (b"fLaC", "audio/flac"),
            (b"ID3", "audio/mpeg"), (b"\xff\xfb", "audio/mpeg"), (b"\xff\xf3", "audio/mpeg"), (b"II*\0", "image/tiff"),
            (b"MM\0*", "image/tiff"), (b"\x1aE\xdf\xa3", "video/x-matroska"), (b"OggS", "application/ogg"))
RIFF = {b"WAVE": "audio/wav", b"AVI ": "video/avi", b"WEBP": "image/webp"}
BRANDS = {b"heic": "image/heic", b"heix": "image/heic", b"mif1": "image/heif", b"avif": "image/avif",
          b"qt  ": "video/quicktime", b"M4A ": "audio/mp4"}


@dataclass(frozen=True)
class Signer:
    """The operator's certificate chain and key (PEM, PKCS#8), the leaf's fingerprint and the time-stamp server."""

    chain: bytes
    key: bytes = field(repr=False)
    algorithm: str
    fingerprint: str
    tsa_url: str | None
    tsa_required: bool

    def native(self, tsa_url: str | None) -> c2pa.Signer:
        """c2pa's signer; None means no time-stamp server."""
        return c2pa.Signer.from_info(c2pa.C2paSignerInfo(self.algorithm, self.chain, self.key, tsa_url))

    def sign(self, source: Path, target: Path, manifest: dict[str, Any], ingredients: list[Ingredient],
             control: Control) -> bool:
        """Write `source` with its credentials to `target`; returns whether they hold a time stamp. Raises SigningFailed."""
        if self.tsa_url:
            try:
                # c2pa waits for a time-stamp server without limit
                leaving(lambda: self._sign(source, target, manifest, ingredients, self.tsa_url), control, "sign", TSA_SEC)
                return True
            except (C2paError, TimeoutError) as e:
                if self.tsa_required:
                    raise SigningFailed("The film could not be signed with a time stamp from C2PA_TSA_URL: the server did not "
                                        "answer properly", stage="postprocessing", reason="time_stamp") from e
        try:
            self._sign(source, target, manifest, ingredients, None)
        except C2paError as e:
            raise SigningFailed(f"The film could not be signed: {e}", stage="postprocessing", reason="c2pa") from e
        return False

    def _sign(self, source: Path, target: Path, manifest: dict[str, Any], ingredients: list[Ingredient],
              tsa_url: str | None) -> None:
        with (c2pa.Context.from_dict(OFFLINE) as context, c2pa.Builder(json.dumps(manifest), context) as builder,
              self.native(tsa_url) as signer, source.open("rb", BUFFER) as film, target.open("w+b", BUFFER) as signed):
            for ingredient in ingredients:
                ingredient.add(builder)
            builder.sign(signer, "video/mp4", film, signed)


class Ingredient:
    """A source file: added with the credentials that it carries, where c2pa knows its format."""

    def __init__(self, path: Path, label: str, title: str, relationship: str) -> None:
        self.path, self.label, self.format = path, label, media_type(path)
        self.plain: dict[str, Any] = {"title": title, "relationship": relationship, "label": label, "format": self.format}
        self.readable = False
        self.credentials = self._credentials()

    def _credentials(self) -> str:
        """What the source's own credentials are: none, valid, invalid (with the reasons) or unreadable."""
        if self.format not in c2pa.Reader.get_supported_mime_types():
            return "none that can be read from this format"
        try:
            with (self.path.open("rb") as file, c2pa.Context.from_dict(OFFLINE) as context,
                  c2pa.Reader(self.format, file, context=context) as reader):
                self.readable = True
                return state_of(reader)
        except C2paError.ManifestNotFound:
            self.readable = True
            return "none"
        except C2paError as e:
            return f"unreadable: {str(e)[:200]}"

    def add(self, builder: c2pa.Builder) -> None:
        """Add it to a manifest, its own manifest included."""
        if self.readable:
            with self.path.open("rb") as file:
                builder.add_ingredient(self.plain, self.format, file)


def state_of(reader: c2pa.Reader) -> str:
    """valid, or invalid with c2pa's codes."""
    state = judged(reader.get_validation_results() or {})
    return state if state != "valid" or reader.get_validation_state() in ("Valid", "Trusted") else "invalid"


def judged(results: dict[str, Any]) -> str:
    """The same of a manifest's validation results; that nobody vouches for the signer is no fault of the file."""
    codes = sorted({f["code"] for f in results.get("activeManifest", {}).get("failure", [])} - {TRUST})
    return f"invalid: {', '.join(codes)}" if codes else "valid"


def media_type(path: Path) -> str:
    """The MIME type by the file's first bytes: downloads have no name to go by."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], "video/mp4")
    if head[:4] == b"RIFF":
        return RIFF.get(head[8:12], "application/octet-stream")
    return next((kind for prefix, kind in PREFIXES if head.startswith(prefix)), "application/octet-stream")


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
        with (c2pa.Context.from_dict(OFFLINE) as context, signer.native(None) as native,
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
