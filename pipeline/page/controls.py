"""What the request's schema and the service's bodies look like on the page: controls, words, and the request for production."""

from __future__ import annotations

import contextlib
import html
import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.value_element import ValueElement
from pydantic import ValidationError

from pipeline.schema import JobRequest, Params

SHAPE = ("aspect_ratio", "resolution")  # fields of the request beside its params
GROUPS = {  # what people tune first; every other parameter is under "More"
    "Mouth": ("extra_margin", "parsing_mode", "left_cheek_width", "right_cheek_width", "quality", "finish"),
    "Dubbing": ("silence", "length", "background", "openness"),
    "Film": (*SHAPE, "fit", "fps", "loop"),
}
PLAIN = {  # what a control does, where the schema's words are too short
    "silence": "The mouth while nothing is said: auto closes it, rest shows the clip's own, model lets the network draw it.",
    "length": "The film is as long as the speech, or as the clip, whose end stays as it was filmed.",
    "background": "How loud the clip's own sound stays under the speech: 0 is silent, 1 is unchanged.",
    "openness": "How wide the mouth opens: 1 is what the network draws.",
}
FIELDS: dict[str, dict[str, Any]] = {  # JSON Schema of each
    **{n: JobRequest.model_json_schema()["properties"][n] for n in SHAPE}, **Params.model_json_schema()["properties"]}
GROUPS = {title: tuple(n for n in names if n in FIELDS) for title, names in GROUPS.items()}
GROUPS["More"] = tuple(n for n in FIELDS if not any(n in names for names in GROUPS.values()))
FILES = {"video_url": "clip", "audio_url": "speech"}  # the request's names, and the page's
Said = tuple[str, dict[str, Any] | None, float]  # where a speech is, its face where one was picked, and its start


def control_of(name: str, field: dict[str, Any]) -> ValueElement[Any]:
    """The control for a field: its type picks the kind, its description is the help under it."""
    label, value = name.replace("_", " "), field["default"]
    kinds = [kind for kind in field.get("anyOf", [field]) if kind["type"] != "null"]
    words = [word for kind in kinds for word in kind.get("enum", ())]
    with ui.column().classes("w-full gap-0"):
        if words:
            other: dict[str, Any] = {"with_input": True, "new_value_mode": "add-unique"} if len(kinds) > 1 else {}
            control: ValueElement[Any] = ui.select(words, label=label, value=value, clearable=value is None, **other)
            control.classes("w-full")
        elif kinds[0]["type"] == "boolean":
            control = ui.checkbox(label, value=value)
        elif kinds[0]["type"] == "string":
            control = ui.input(label, value=value).classes("w-full")
        else:
            control = _number(label, value, kinds[0])
        ui.label(PLAIN.get(name, field["description"])).classes("help")
    return control


def _number(label: str, value: float | None, kind: dict[str, Any]) -> ValueElement[Any]:
    """A box for a number, with a slider where it always has a value."""
    whole = kind["type"] == "integer"
    limits: dict[str, Any] = {"min": kind.get("minimum"), "max": kind.get("maximum"), "step": 1 if whole else 0.01}
    if value is None:
        return ui.number(label, precision=0 if whole else None, **limits).classes("w-full")
    with ui.row().classes("w-full items-center justify-between no-wrap"):
        ui.label(label)
        box = ui.number(value=value, **limits).props(f'dense outlined aria-label="{label}"').classes("w-24")
    ui.slider(value=value, **limits).props(f'aria-label="{label}, slider"').bind_value(box)
    return box


def request_of(values: dict[str, Any]) -> dict[str, Any]:
    """The request's fields that differ from their defaults; numbers as the schema has them, where a browser knows one kind."""
    shape = {n: values[n] for n in SHAPE if values.get(n) not in (None, "", FIELDS[n]["default"])}
    params = {n: v for n, v in values.items() if n not in SHAPE}
    with contextlib.suppress(ValidationError):  # what is wrong goes on as it is: the service says what
        params = Params.model_validate(params, strict=False).model_dump(exclude_defaults=True)
    return {**shape, **({"params": params} if params else {})}


def job_of(request: dict[str, Any], job_id: str, video: str, said: Sequence[Said]) -> dict[str, Any]:
    """The job of a request's tuned fields, a clip and its speeches. Of several whose faces are not picked, the first is the
    leftmost face's, the second the next one's.
    """
    job = {**request, "musetalk_job_id": job_id, "video_url": video}
    if len(said) == 1 and said[0][1] is None:
        return {**job, "audio_url": said[0][0]}
    if "params" in job:
        job["params"] = {name: value for name, value in job["params"].items() if name != "face"}
    return {**job, "speakers": [{"audio_url": audio, "face": i if face is None else face, "start": start}
                                for i, (audio, face, start) in enumerate(said)]}


def as_curl(job: dict[str, Any]) -> tuple[str, str]:
    """A job as JSON, and as a command for the HTTP door; the files' places are to be filled in."""
    body = {**job, "musetalk_job_id": "job-1", "video_url": "https://HOST/clip"}
    if "speakers" in job:
        body["speakers"] = [{**each, "audio_url": f"https://HOST/speech-{i}"} for i, each in enumerate(job["speakers"], 1)]
    else:
        body["audio_url"] = "https://HOST/speech"
    door = "curl -s http://localhost:8000/generate -H 'Content-Type: application/json' -d "
    return json.dumps(body, indent=2), door + shlex.quote(json.dumps(body))


def explained(body: dict[str, Any]) -> str:
    """A failure's body in two sentences: what is wrong, with the page's own names of fields, and what to do."""
    message = re.sub(r"\bspeakers\.(\d)\.(\w+)", lambda m: f"{FILES.get(m[2], m[2])} {int(m[1]) + 1}", body["error_message"])
    message = re.sub(r"\b(video_url|audio_url)\b", lambda m: FILES[m[0]], message)
    message = re.sub(r"\bparams\.(\w+)", lambda m: m[1].replace("_", " "), message)
    field, advice = body["details"].get("field") or "", "See the table of failures in docs/api.md."
    part = field.rpartition(".")[2]
    if field.startswith("speakers.") and part == "face":
        advice = "Pick another face, or remove the speaker."
    elif body["details"].get("reason") == "no_face":
        advice = "Choose another clip."
    elif body["retryable"]:
        advice = "Another try may succeed unchanged."
    elif part in FILES:
        advice = f"Choose another {FILES[part]}."
    elif field:
        advice = f"Change {field.removeprefix('params.').replace('_', ' ')}."
    return f"{message.rstrip('.')}. {advice}"


def stage_bar(seconds: dict[str, float]) -> str:
    """The stages' times as one bar, in HTML; a narrow stage says its name where the mouse rests."""
    total = sum(seconds.values())
    return "<div class=stages>" + "".join(
        f"<span style='flex:{share / total:.4f}' title='{name} {share:.2f} s'>{name if share > total / 8 else ''}</span>"
        for name, share in seconds.items() if share) + "</div>"


def metrics_table(metrics: dict[str, Any]) -> str:
    """The metrics in HTML."""
    shown = {k: v for k, v in metrics.items() if k != "stage_times" and v is not None}
    return "<table class=metrics>" + "".join(
        f"<tr><td>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in shown.items()) + "</table>"
