"""A local page to try the worker and to tune its parameters by eye: python -m pipeline.page [--port 7860].

It stands before the same `Service` as the other doors. Controls are made from the request's schema, so a new field shows up
by itself. Bound to this machine unless told otherwise; nothing is asked of any other host.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import html
import json
import os
import shlex
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")  # before gradio looks: nothing phones home
import gradio as gr
from PIL import Image
from pydantic import ValidationError

from pipeline.film.preview import Picture, Preview
from pipeline.job import logs
from pipeline.job.control import Control
from pipeline.run import Service, failure
from pipeline.schema import JobRequest, Params, parse
from pipeline.settings import BadSetting, Settings, asset

SAMPLES = asset("samples")
SHAPE = ("aspect_ratio", "resolution")  # fields of the request beside its params
GROUPS = {  # what people tune first; every other parameter is under "More"
    "Mouth": ("extra_margin", "parsing_mode", "left_cheek_width", "right_cheek_width", "quality", "finish", "silence"),
    "Film": (*SHAPE, "fit", "fps", "loop"),
}
FIELDS: dict[str, dict[str, Any]] = {  # JSON Schema of each
    **{n: JobRequest.model_json_schema()["properties"][n] for n in SHAPE}, **Params.model_json_schema()["properties"]}
GROUPS["More"] = tuple(n for n in FIELDS if not any(n in names for names in GROUPS.values()))
ORDER = [n for names in GROUPS.values() for n in names]  # of the controls, and of their values in every event
EMPTY = "Choose a clip or a still image and a speech, or use the samples."
CSS = """
.bar {display: flex; height: 1.6em; border-radius: 4px; overflow: hidden; background: var(--background-fill-secondary)}
.bar span {background: var(--primary-500); color: white; padding-left: .4em; white-space: nowrap; overflow: hidden;
  border-right: 1px solid white; font-size: .8em; line-height: 2em}
.pair {display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 8px}
.pair video, .pair img {width: 100%; border-radius: 6px}
.bad {border-left: 4px solid #d33; padding: .5em 1em}
"""
# media events do not bubble, so they are caught on their way down; the film leads, the source follows
LOCKSTEP = """
for (const name of ['play', 'pause', 'seeked', 'timeupdate']) element.addEventListener(name, event => {
  const [source, film] = element.querySelectorAll('video');
  if (!film || event.target !== film || !source.duration) return;
  film.paused ? source.pause() : source.play();
  const at = film.currentTime % source.duration;
  if (Math.abs(source.currentTime - at) > 0.08) source.currentTime = at;
}, true)"""


class Session:
    """What one browser tab holds: its folder, its uploads, the preview that is open and the job that runs."""

    def __init__(self, service: Service, root: Path) -> None:
        self.service, self.folder = service, root / "uploads" / uuid.uuid4().hex  # where gradio serves files from
        self.folder.mkdir(parents=True)
        self.uploads: set[Path] = set()  # all it ever chose
        self.control = Control(0)
        self._open = contextlib.ExitStack()
        self._shown: tuple[tuple[str, str], Preview] | None = None

    def preview(self, clip: str, speech: str) -> Preview:
        """Single frames of these files, which are read again when one of them has changed. Raises JobError."""
        if self._shown is None or self._shown[0] != (clip, speech):
            self._shown = None
            self._open.close()
            opened = self._open.enter_context(self.service.preview(job_of(clip, speech, {})))
            self._shown = (clip, speech), opened
        return self._shown[1]

    def pictures(self, *shown: Picture) -> list[str]:
        """Files of the pictures (H, W, 3) that are shown now, in place of those before."""
        for old in self.folder.glob("*.jpg"):
            old.unlink()
        files = [str(self.folder / f"{uuid.uuid4().hex}.jpg") for _ in shown]
        for pixels, file in zip(shown, files, strict=True):
            Image.fromarray(pixels).save(file, quality=90)
        return files

    def render(self, job: dict[str, Any], progress: Any) -> dict[str, Any]:
        """The body of a job, whose film lies in this session's folder. `progress(stage, share)` is told how far it is."""
        self.control = Control(self.service.settings.job_deadline_sec, progress)
        body = self.service.run_job({**job, "musetalk_job_id": f"page-{uuid.uuid4().hex}"}, control=self.control)
        if body["status"] == "success":
            body["output_url"] = shutil.move(body["output_url"].removeprefix("file://"), self.folder)
        return body

    def close(self, others: Iterable[Session]) -> None:
        """The tab is gone: end its job, delete its files; equal uploads of several tabs are one file."""
        self.control.cancel()
        self._open.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.uploads.difference(*(other.uploads for other in others)):
            path.unlink(missing_ok=True)


# -- controls from the schema ----------------------------------------------------------------------------------------


def control_of(name: str, field: dict[str, Any]) -> gr.components.Component:
    """The control for a field: its type picks the kind, its description is the help."""
    given = {"label": name.replace("_", " "), "value": field["default"], "info": field["description"]}
    kinds = [kind for kind in field.get("anyOf", [field]) if kind["type"] != "null"]
    if words := [word for kind in kinds for word in kind.get("enum", ())]:
        return gr.Dropdown(words, allow_custom_value=len(kinds) > 1, **given)
    (kind,) = kinds
    if kind["type"] in ("boolean", "string"):
        return (gr.Checkbox if kind["type"] == "boolean" else gr.Textbox)(**given)
    whole = kind["type"] == "integer"
    if field["default"] is None:
        return gr.Number(precision=0 if whole else None, minimum=kind.get("minimum"), **given)
    return gr.Slider(kind["minimum"], kind["maximum"], step=1 if whole else 0.01, **given)


def request_of(values: dict[str, Any]) -> dict[str, Any]:
    """The request's fields that differ from their defaults; numbers as the schema has them, where a browser knows one kind."""
    shape = {n: values[n] for n in SHAPE if values.get(n) not in (None, "", FIELDS[n]["default"])}
    params = {n: v for n, v in values.items() if n not in SHAPE}
    with contextlib.suppress(ValidationError):  # what is wrong goes on as it is: the service says what
        params = Params.model_validate(params, strict=False).model_dump(exclude_defaults=True)
    return {**shape, **({"params": params} if params else {})}


def job_of(clip: str, speech: str, values: dict[str, Any]) -> dict[str, Any]:
    """The job that the files and the controls describe."""
    return {"musetalk_job_id": "page", "video_url": clip, "audio_url": speech, **request_of(values)}


# -- what is shown ---------------------------------------------------------------------------------------------------


def failed(body: dict[str, Any]) -> str:
    """A failure in one line, and what to do."""
    field, advice = body["details"].get("field"), "See the README's table of failures."
    if body["retryable"]:
        advice = "Another try may succeed unchanged."
    elif field in ("video_url", "audio_url"):
        advice = f"Choose another {'clip' if field == 'video_url' else 'speech'}."
    elif field:
        advice = f"Change {field.removeprefix('params.').replace('_', ' ')}."
    return f"<div class=bad><b>{html.escape(body['error_message'])}</b><br>{html.escape(advice)}</div>"


def stage_bar(seconds: dict[str, float]) -> str:
    """The stages' times as one bar; a narrow stage says its name where the mouse rests."""
    total = sum(seconds.values())
    return f"done in {total:.1f} s<div class=bar>" + "".join(
        f"<span style='flex:{share / total:.4f}' title='{name} {share:.2f} s'>{name if share > total / 8 else ''}</span>"
        for name, share in seconds.items() if share) + "</div>"


def as_curl(request: dict[str, Any]) -> tuple[str, str]:
    """The request as JSON, and as a command for the HTTP door; the files' places are to be filled in."""
    body = {**request, "musetalk_job_id": "job-1", "video_url": "https://HOST/clip", "audio_url": "https://HOST/speech"}
    door = "curl -s http://localhost:8000/generate -H 'Content-Type: application/json' -d "
    return json.dumps(body, indent=2), door + shlex.quote(json.dumps(body))


# -- the page --------------------------------------------------------------------------------------------------------


def show(session: Session, clip: str | None, webcam: str | None, speech: str | None, second: float, outline: bool,
         *values: Any) -> tuple[Any, ...]:
    """What every change leads to: the frame, before and after; a notice; the request; how far the scrubber goes."""
    chosen = dict(zip(ORDER, values, strict=True))
    request, source = as_curl(request_of(chosen)), clip or webcam
    session.uploads |= {Path(file) for file in (clip, webcam, speech) if file}
    if not (source and speech):
        return None, None, EMPTY, *request, gr.skip()
    try:
        preview = session.preview(source, speech)
        shown = preview.frame(parse(job_of(source, speech, chosen)), second)
    except Exception as e:  # every failure is one line, as the service tells it
        return None, None, failed(failure(e)), *request, gr.skip()
    note = "" if shown.region is not None else "No mouth is painted here: this frame shows no face, or a silence."
    pictures = session.pictures(shown.source, shown.outlined() if outline else shown.film)
    return *pictures, note, *request, gr.update(maximum=round(preview.inputs.speech.seconds, 2))


def render(session: Session, clip: str | None, webcam: str | None, speech: str | None,
           progress: Any = gr.Progress(), *values: Any) -> tuple[Any, ...]:  # noqa: B008 (so gradio knows it)
    """How it went, the film beside its source, and the metrics; meanwhile gradio draws the progress."""
    source, context = clip or webcam, contextvars.copy_context()  # the context tells gradio whose progress it is
    if not (source and speech):
        return EMPTY, "", None
    body = session.render(job_of(source, speech, dict(zip(ORDER, values, strict=True))),
                          lambda stage, share: context.run(progress, share, desc=stage))
    if body["status"] != "success":
        return failed(body), gr.skip(), gr.skip()
    metrics = body["metrics"]
    table = [[k, v] for k, v in metrics.items() if k != "stage_times" and v is not None]
    return stage_bar(metrics["stage_times"]), pair(source, body["output_url"]), table


def pair(source: str, film: str) -> str:
    """Source and film side by side; playing the film plays both."""
    still = Path(source).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff")
    left, right = (f"src='/gradio_api/file={quote(path)}'" for path in (source, film))
    shown = f"<img {left}>" if still else f"<video muted loop {left}></video>"
    return f"<div class=pair>{shown}<video id=film controls {right}></video></div>"


def build(service: Service, root: Path) -> gr.Blocks:
    """The page over a service; sessions keep their files under `root`."""
    with gr.Blocks(title="MuseTalk worker", analytics_enabled=False) as page:
        session, open_tabs = gr.State(None), dict[str | None, Session]()
        with gr.Row():
            with gr.Column(scale=1):
                with gr.Tab("Clip or still"):
                    clip = gr.File(label="video or picture", height=140)
                with gr.Tab("Webcam"):
                    webcam = gr.Video(sources=["webcam"], label="record a clip", height=240, include_audio=True,
                                      webcam_options=gr.WebcamOptions(mirror=False))  # kept as it is: no ffmpeg on the PATH
                speech = gr.Audio(type="filepath", sources=["upload", "microphone"], label="speech", buttons=[])
                samples = gr.Button("Use the samples", size="sm")
                values: list[gr.components.Component] = []  # in the order of ORDER
                for title, names in GROUPS.items():
                    with gr.Accordion(title, open=title == "Mouth"):
                        values += [control_of(n, FIELDS[n]) for n in names]
            with gr.Column(scale=2):
                with gr.Row():
                    source = gr.Image(label="source", interactive=False, buttons=[])
                    film = gr.Image(label="film", interactive=False, buttons=[], elem_id="frame")
                with gr.Row():
                    second = gr.Slider(0, 10, 0.5, step=0.04, label="second of the film", scale=4)
                    outline = gr.Checkbox(label="outline region", scale=1)
                notice = gr.HTML(EMPTY, elem_id="notice")
                with gr.Row():
                    go, stop = gr.Button("Render the film", variant="primary"), gr.Button("Stop", variant="stop")
                progress, result = gr.HTML(elem_id="progress"), gr.HTML(elem_id="result", js_on_load=LOCKSTEP)
                with gr.Accordion("Metrics", open=False):
                    metrics = gr.Dataframe(headers=["metric", "value"], interactive=False, show_label=False)
                with gr.Accordion("For production: the same request", open=False):
                    as_json, curl = gr.Code(language="json", label="JSON"), gr.Code(language="shell", label="curl")
        inputs = [session, clip, webcam, speech, second, outline, *values]
        changes = [c.input for c in (second, outline, *values)] + [c.change for c in (clip, webcam, speech)]
        gr.on(changes, show, inputs, [source, film, notice, as_json, curl, second], trigger_mode="always_last",
              show_progress="hidden", api_visibility="private")
        samples.click(lambda: (str(SAMPLES / "presenter.mp4"), str(SAMPLES / "speech.wav")), None, [clip, speech],
                      api_visibility="private")
        go.click(render, [session, clip, webcam, speech, *values], [progress, result, metrics], show_progress_on=progress,
                 api_visibility="private")
        stop.click(lambda session: session.control.cancel(), session, None, api_visibility="private")

        def begin(request: gr.Request) -> Session:
            return open_tabs.setdefault(request.session_hash, Session(service, root))

        def end(request: gr.Request) -> None:
            if (gone := open_tabs.pop(request.session_hash, None)) is not None:
                gone.close(open_tabs.values())

        page.load(begin, None, session, api_visibility="private")
        page.unload(end)
        page.queue(default_concurrency_limit=None)  # sessions do not wait for one another, but for the engine
    return page


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.page", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    logs.setup("ERROR")
    with tempfile.TemporaryDirectory(prefix="musetalk-page-") as folder:
        root = Path(folder).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(root / "uploads")
        try:
            settings = Settings.for_shell().model_copy(update={
                "storage": "local", "local_storage_dir": root / "films", "local_input_root": root})
            service = Service(settings)
        except BadSetting as e:
            parser.exit(1, f"error: {e}\n")
        threading.Thread(target=service.engine.warm_up, daemon=True).start()
        build(service, root).launch(
            server_name=options.host, server_port=options.port, share=False, quiet=True,
            allowed_paths=[str(SAMPLES)], max_file_size=f"{settings.max_download_mb:g}mb", css=CSS,
            footer_links=[], enable_monitoring=False, ssr_mode=False, mcp_server=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]))


if __name__ == "__main__":
    main()
