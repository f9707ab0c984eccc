"""What a file says about its making, read back.

    python -m pipeline.provenance FILE [--json]

prints what a file says (IPTC, content credentials) and exits with 0 when it is marked as made with generative models,
3 when it is not, 2 when it cannot be read.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import c2pa
from c2pa import C2paError

from pipeline.mark.sign import OFFLINE, judged, media_type, state_of

SYNTHETIC = re.compile(r"/(compositeWithT|t)rainedAlgorithmicMedia$")  # IPTC's terms for generative models
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
BEGIN, END = b"<x:xmpmeta", b"</x:xmpmeta>"
PACKET_BYTES = 1_000_000  # at most


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
        packets = list(_packets(data))
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


def _packets(data: mmap.mmap) -> Iterator[bytes]:
    """XMP packets of any file; every byte is looked at a bounded number of times, whatever a stranger wrote."""
    at = 0
    while (end := data.find(END, at)) >= 0:
        begin = data.rfind(BEGIN, max(at, end - PACKET_BYTES), end)
        at = end + len(END)
        if begin >= 0:
            yield data[begin:at]


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
