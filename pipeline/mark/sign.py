"""Signs one film with c2pa, as a helper process of `credentials.Signer`: c2pa waits for a time-stamp server without limit.

    python -m pipeline.mark.sign        (a request at stdin, see `transfer.serve`)

It also is the only place where c2pa reads a stranger's clip, so that no clip can harm the worker.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import c2pa
from c2pa import C2paError

from pipeline.transfer.serve import Failed, serve

SYSTEM = "MuseTalk"
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
DESCRIPTION = "The mouth in this film was generated from the speech by an AI system (MuseTalk)."
# neither a source's credentials nor a certificate may make the worker call an address of their choice
# and a film is hashed piece by piece and its copies lie in a file: by default c2pa holds both in memory, up to 512 MB
OFFLINE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
           "core": {"backing_store_memory_threshold_in_mb": 4, "merkle_tree_chunk_size_in_kb": 4096}}
TRUST = "signingCredential.untrusted"  # no list of trusted authorities is kept here; all else must be valid
BUFFER = 1 << 20  # bytes; c2pa asks for 8 kB at a time
PREFIXES = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"), (b"fLaC", "audio/flac"),
            (b"ID3", "audio/mpeg"), (b"\xff\xfb", "audio/mpeg"), (b"\xff\xf3", "audio/mpeg"), (b"II*\0", "image/tiff"),
            (b"MM\0*", "image/tiff"), (b"\x1aE\xdf\xa3", "video/x-matroska"), (b"OggS", "application/ogg"))
RIFF = {b"WAVE": "audio/wav", b"AVI ": "video/avi", b"WEBP": "image/webp"}
BRANDS = {b"heic": "image/heic", b"heix": "image/heic", b"mif1": "image/heif", b"avif": "image/avif",
          b"qt  ": "video/quicktime", b"M4A ": "audio/mp4"}


class Ingredient:
    """A source file: added with the credentials that it carries, where c2pa knows its format."""

    def __init__(self, path: str, label: str, title: str, relationship: str, sha256: str) -> None:
        self.path, self.label, self.sha256 = Path(path), label, sha256
        self.format = media_type(self.path)
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


def native_signer(algorithm: str, chain: str, key: str, tsa_url: str | None) -> c2pa.Signer:
    """c2pa's signer of a certificate chain and key in PEM form; None means no time-stamp server."""
    return c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, chain.encode(), key.encode(), tsa_url))


def manifest_of(job: dict[str, str], ingredients: list[Ingredient]) -> dict[str, Any]:
    """c2pa's definition of the manifest; nothing in it differs between two runs of a job."""
    sources = {i.label: {"sha256": i.sha256, "credentials": i.credentials} for i in ingredients}
    agent = {"name": SYSTEM, "version": job["weights_version"]}
    actions = [
        {"action": "c2pa.opened", "parameters": {"ingredientIds": ["clip"]}},
        {"action": "c2pa.edited", "digitalSourceType": COMPOSITE, "softwareAgent": agent,
         "parameters": {"ingredientIds": [i.label for i in ingredients if i.label != "clip"], "description": DESCRIPTION}}]
    stated = {"job_id": job["job_id"], "weights": job["weights_identity"], "sources": sources}
    return {
        "claim_generator_info": [{"name": "MuseTalk worker", "version": job["revision"]}],
        "title": job["title"], "ingredients": [i.plain for i in ingredients if not i.readable],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}},
                       {"label": "org.musetalk.job", "data": stated}]}


def sign(request: dict[str, Any]) -> dict[str, Any]:
    """Write `film` with its credentials to `target`; returns the manifest. Raises Failed."""
    try:
        ingredients = [Ingredient(**source) for source in request["sources"]]
        manifest = manifest_of(request["job"], ingredients)
        with (c2pa.Context.from_dict(OFFLINE) as context, c2pa.Builder(json.dumps(manifest), context) as builder,
              native_signer(**request["signer"]) as signer, Path(request["film"]).open("rb", BUFFER) as film,
              Path(request["target"]).open("w+b", BUFFER) as signed):
            for ingredient in ingredients:
                ingredient.add(builder)
            builder.sign(signer, media_type(Path(request["film"])), film, signed)
    except C2paError as e:
        raise Failed("c2pa", str(e)[:500]) from e
    return manifest


if __name__ == "__main__":
    serve(sign)
