"""What a film says about its making: written into every film, and read back.

    python -m pipeline.provenance FILE [--json]

prints what a file says (IPTC, content credentials) and exits with 0 when it is marked as made with generative models,
3 when it is not, 2 when it cannot be read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import c2pa
from c2pa import C2paError

from pipeline.job.control import Control
from pipeline.mark.credentials import OFFLINE, Ingredient, check_signer, judged, media_type, state_of
from pipeline.settings import Settings

SYSTEM = "MuseTalk"
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
SYNTHETIC = re.compile(r"/(compositeWithT|t)rainedAlgorithmicMedia$")  # IPTC's terms for generative models
DESCRIPTION = "The mouth in this film was generated from the speech by an AI system (MuseTalk)."
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
PACKET = re.compile(rb"<x:xmpmeta.{1,1000000}?</x:xmpmeta>", re.DOTALL)
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
    """How a film was made: what the marks state. `clip` and `speech` are the source files, with their sha256 beside them."""

    job_id: str
    weights_version: str
    weights_identity: str
    clip: Path
    clip_sha256: str
    speech: Path
    speech_sha256: str


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

    def finish(self, film: Path, making: Making, control: Control) -> Mark:
        """Write the marks into a finished MP4, in place. Raises SigningFailed; the film is then not signed at all."""
        if self.settings.ai_label == "off":
            return Mark("none")
        _append_xmp(film, self.settings.revision, making)
        if self.signer is None:
            return Mark("IPTC")
        ingredients = [Ingredient(making.clip, "clip", "source clip", "parentOf"),
                       Ingredient(making.speech, "speech", "speech", "componentOf")]
        manifest = self._manifest(making, ingredients)
        with film.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        stated = [manifest, self.signer.fingerprint, self.signer.tsa_url]
        digest.update(json.dumps(stated, sort_keys=True).encode())
        signed = film.with_name(f"signed-{film.name}")
        try:
            stamped = self.signer.sign(film, signed, manifest, ingredients, control)
            signed.replace(film)
        finally:
            signed.unlink(missing_ok=True)
        missing = " without a time stamp" if self.signer.tsa_url and not stamped else ""
        return Mark(f"IPTC, C2PA{missing}", digest.hexdigest())

    def _manifest(self, making: Making, ingredients: list[Ingredient]) -> dict[str, Any]:
        """c2pa's definition of the manifest; nothing in it differs between two runs of a job."""
        digests = {"clip": making.clip_sha256, "speech": making.speech_sha256}
        sources = {i.label: {"sha256": digests[i.label], "credentials": i.credentials} for i in ingredients}
        agent = {"name": SYSTEM, "version": making.weights_version}
        actions = [
            {"action": "c2pa.opened", "parameters": {"ingredientIds": ["clip"]}},
            {"action": "c2pa.edited", "digitalSourceType": COMPOSITE, "softwareAgent": agent,
             "parameters": {"ingredientIds": ["speech"], "description": DESCRIPTION}}]
        job = {"job_id": making.job_id, "weights": making.weights_identity, "sources": sources}
        return {
            "claim_generator_info": [{"name": "MuseTalk worker", "version": self.settings.revision}],
            "title": f"{making.job_id}.mp4", "ingredients": [i.plain for i in ingredients if not i.readable],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}},
                           {"label": "org.musetalk.job", "data": job}]}


def _append_xmp(film: Path, revision: str, making: Making) -> None:
    """The standard uuid box at the file's end, where no offset into the film changes."""
    packet = XMP.format(iptc=IPTC, kind=COMPOSITE, system=SYSTEM, revision=escape(revision),
                        version=escape(f"{making.weights_version} ({making.weights_identity[:16]})")).encode()
    with film.open("ab") as file:
        file.write(struct.pack(">I4s16s", 24 + len(packet), b"uuid", XMP_UUID) + packet)


# -- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """What a file says about its making: `marked`, `iptc` and `c2pa`, each None where there is none. Raises OSError."""
    iptc, credentials = _read_iptc(path), _read_c2pa(path)
    kinds = [(iptc or {}).get("digital_source_type"), *(credentials or {}).get("digital_source_types", [])]
    return {"file": str(path), "marked": any(SYNTHETIC.search(k or "") for k in kinds), "iptc": iptc, "c2pa": credentials}


def _read_iptc(path: Path) -> dict[str, str | None] | None:
    """IPTC's statement in the file's XMP, wherever in the file that lies."""
    if not path.stat().st_size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        packets = [m.group() for m in PACKET.finditer(data)]
    for packet in packets:
        if b"<!" in packet or b"DigitalSourceType" not in packet:  # no entities from strangers
            continue
        try:
            root = ElementTree.fromstring(packet)
        except ElementTree.ParseError:
            continue
        found = {name: _property(root, name) for name in ("DigitalSourceType", "AISystemUsed", "AISystemVersionUsed")}
        if found["DigitalSourceType"]:
            return {"digital_source_type": found["DigitalSourceType"], "ai_system": found["AISystemUsed"],
                    "ai_system_version": found["AISystemVersionUsed"]}
    return None


def _property(root: ElementTree.Element, name: str) -> str | None:
    """A simple property: XMP writes it as an element or as an attribute."""
    tag = f"{{{IPTC}}}{name}"
    return next((e.text or e.get(tag) for e in root.iter() if e.tag == tag or e.get(tag)), None)


def _read_c2pa(path: Path) -> dict[str, Any] | None:
    kind = media_type(path)
    if kind not in c2pa.Reader.get_supported_mime_types():
        return None
    try:
        with (path.open("rb") as file, c2pa.Context.from_dict(OFFLINE) as context,
              c2pa.Reader(kind, file, context=context) as reader):
            state, store = state_of(reader), json.loads(reader.json())
    except C2paError.ManifestNotFound:
        return None
    except C2paError as e:
        return {"state": f"unreadable: {e}"}
    active = store["manifests"][store["active_manifest"]]
    signature = active.get("signature_info", {})
    actions = [a for x in active.get("assertions", []) if x["label"].startswith("c2pa.actions") for a in x["data"]["actions"]]
    generators = [f"{g.get('name')} {g.get('version', '')}".strip() for g in active.get("claim_generator_info", [])]
    return {
        "state": state, "signer": signature.get("common_name") or signature.get("issuer"),
        "issuer": signature.get("issuer"), "time": signature.get("time"), "generator": ", ".join(generators),
        "actions": [a["action"] for a in actions],
        "digital_source_types": [a["digitalSourceType"] for a in actions if "digitalSourceType" in a],
        "job": next((x["data"] for x in active.get("assertions", []) if x["label"] == "org.musetalk.job"), None),
        "ingredients": [{
            **{name: i.get(name) for name in ("title", "format", "relationship")},
            "credentials": judged(i.get("validation_results", {})) if "active_manifest" in i else "none",
        } for i in active.get("ingredients", [])]}


def words(found: dict[str, Any]) -> str:
    """A report for people."""
    lines = [f"{found['file']}: {'marked' if found['marked'] else 'not marked'} as made with generative models"]
    if iptc := found["iptc"]:
        lines.append(f"IPTC: {iptc['digital_source_type']}, {iptc['ai_system']} {iptc['ai_system_version']}")
    if (credentials := found["c2pa"]) and "signer" not in credentials:
        lines.append(f"C2PA: {credentials['state']}")
    elif credentials:
        when = credentials["time"] or "no time stamp"
        lines.append(f"C2PA: {credentials['state']}; signed by {credentials['signer']} ({credentials['issuer']}), {when}; "
                     f"{credentials['generator']}; {', '.join(credentials['actions'])}")
        lines += [f"  ingredient {i['title']} ({i['format']}): credentials {i['credentials']}"
                  for i in credentials["ingredients"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 marked, 3 not marked, 2 the file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.provenance", description="what a file says about its making")
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    try:
        found = read(arguments.file)
    except OSError as e:
        print(f"error: {arguments.file}: {os.strerror(e.errno or 0)}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if arguments.json else words(found))
    return 0 if found["marked"] else 3


if __name__ == "__main__":
    sys.exit(main())
