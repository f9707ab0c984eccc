"""What is written into every film about its making: IPTC metadata, and content credentials where a signer is set."""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from pipeline.job.control import Control
from pipeline.mark.credentials import Signer, check_signer
from pipeline.mark.sign import COMPOSITE, DESCRIPTION, SYSTEM
from pipeline.settings import Settings

IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
EBML_VOID = b"\xec"
XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="{iptc}" xmlns:xmp="http://ns.adobe.com/xap/1.0/">
<xmp:CreatorTool>MuseTalk worker {revision}</xmp:CreatorTool>
<Iptc4xmpExt:DigitalSourceType>{kind}</Iptc4xmpExt:DigitalSourceType>
<Iptc4xmpExt:AISystemUsed>{system}</Iptc4xmpExt:AISystemUsed>
<Iptc4xmpExt:AISystemVersionUsed>{version}</Iptc4xmpExt:AISystemVersionUsed>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""


@dataclass(frozen=True)
class Making:
    """How a film was made: what the marks state. `clip` and `speeches` are the source files, with their sha256."""

    job_id: str
    weights_version: str
    weights_identity: str
    clip: Path
    clip_sha256: str
    speeches: tuple[tuple[Path, str], ...]


@dataclass(frozen=True)
class Mark:
    """What was written. `digest` names what was signed, empty where the film's own bytes do."""

    written: str
    digest: str = ""


def tags(settings: Settings) -> tuple[str, ...]:
    """The encoder's options for the plain metadata that every player shows."""
    if settings.ai_label == "off":
        return ()
    return ("-metadata", f"comment={DESCRIPTION}", "-metadata", f"description={DESCRIPTION} {COMPOSITE}")


class Marker:
    """Marks films as the settings say; raises BadSetting when the signer they name cannot sign."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.signer = check_signer(settings)

    def label(self, film: Path, making: Making) -> None:
        """Write the IPTC metadata to the end of a film, or of a stream's first part, unless the settings say no."""
        if self.settings.ai_label != "off":
            _append_xmp(film, self.settings.revision, making)

    def finish(self, film: Path, making: Making, control: Control) -> Mark:
        """Write the marks into a finished film, in place. Raises SigningFailed; the film is then not signed at all."""
        if self.settings.ai_label == "off":
            return Mark("none")
        self.label(film, making)
        if self.signer is not None and film.suffix == ".webm":
            return Mark("IPTC, no C2PA in WebM")
        return Mark("IPTC") if self.signer is None else self._sign(self.signer, film, making, control)

    def _sign(self, signer: Signer, film: Path, making: Making, control: Control) -> Mark:
        job = {"job_id": making.job_id, "title": making.job_id + film.suffix, "weights_version": making.weights_version,
               "weights_identity": making.weights_identity, "revision": self.settings.revision}
        sources = [{"path": str(making.clip.resolve()), "label": "clip", "title": "source clip", "relationship": "parentOf",
                    "sha256": making.clip_sha256}]
        for number, (speech, digest_of) in enumerate(making.speeches, 1):
            name = "speech" if number == 1 else f"speech-{number}"
            sources.append({"path": str(speech.resolve()), "label": name, "title": name.replace("-", " "),
                            "relationship": "componentOf", "sha256": digest_of})
        with film.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        with tempfile.TemporaryDirectory(dir=film.parent, prefix="signing-") as folder:
            signed, manifest, stamped = signer.sign(film, Path(folder), job, sources, control)
            signed.replace(film)
        digest.update(json.dumps([manifest, signer.fingerprint, signer.tsa_url], sort_keys=True).encode())
        missing = " without a time stamp" if signer.tsa_url and not stamped else ""
        return Mark(f"IPTC, C2PA{missing}", digest.hexdigest())


def _append_xmp(film: Path, revision: str, making: Making) -> None:
    """XMP at the file's end, where no offset into the film changes: of MP4 and MOV in the standard uuid box; of WebM, which
    has no place for it, in an element that readers skip.
    """
    packet = XMP.format(iptc=IPTC, kind=COMPOSITE, system=SYSTEM, revision=escape(revision),
                        version=escape(f"{making.weights_version} ({making.weights_identity[:16]})")).encode()
    with film.open("ab") as file:
        if film.suffix == ".webm":
            file.write(EBML_VOID + struct.pack(">Q", 1 << 56 | len(packet)) + packet)
            return
        file.write(struct.pack(">I4s16s", 24 + len(packet), b"uuid", XMP_UUID) + packet)
