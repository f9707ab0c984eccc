"""A local page to try the worker and to tune its parameters by eye: python -m pipeline.page [--port 7860].

It stands before the same `Service` as the other doors. Controls are made from the request's schema, so a new field shows up
by itself. Bound to this machine unless told otherwise; nothing is asked of any other host.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import json
import os
import queue
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")  # before gradio looks: nothing phones home
import gradio as gr
import numpy as np
from pydantic.fields import FieldInfo

from pipeline import logs
from pipeline.control import Control
from pipeline.errors import JobError
from pipeline.preview import Preview, Shown
from pipeline.run import Service, failure
from pipeline.schema import JobRequest, Params, parse
from pipeline.settings import REPOSITORY, BadSetting, Settings

SAMPLES = REPOSITORY / "samples"
SHAPE = ("aspect_ratio", "resolution")  # fields of the request beside its params
GROUPS = {  # what people tune first; every other parameter is under "More"
    "Mouth": ("extra_margin", "parsing_mode", "left_cheek_width", "right_cheek_width", "quality", "finish", "silence"),
    "Film": (*SHAPE, "fit", "fps", "loop"),
}
STAGES = {"download": "read", "validation": "check", "inference": "make", "upload": "store"}
FIELDS: dict[str, FieldInfo] = {**{n: JobRequest.model_fields[n] for n in SHAPE}, **Params.model_fields}
GROUPS["More"] = tuple(n for n in FIELDS if not any(n in names for names in GROUPS.values()))
ORDER = [n for names in GROUPS.values() for n in names]  # of the controls, and of their values in every event
EMPTY = "Choose a clip or a still image and a speech, or use the samples."
GREEN = np.array([70, 220, 90], np.uint8)
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
    """What one browser tab holds: its folder, the preview that is open and the job that runs."""

    def __init__(self, service: Service, root: Path) -> None:
        self.service, self.folder = service, root / uuid.uuid4().hex
        self.folder.mkdir()
        self.files: tuple[str | None, str | None] = (None, None)
        self.uploads: set[Path] = set()  # all it ever chose
        self.control: Control | None = None
        self._open = contextlib.ExitStack()
        self._preview: Preview | None = None
        self._one = threading.Lock()

    def job(self, values: dict[str, Any]) -> dict[str, Any]:
        """The request that the controls describe."""
        video, audio = self.files
        return {"musetalk_job_id": "page", "video_url": video or "", "audio_url": audio or "", **request_of(values)}

    def load(self, video: str | None, audio: str | None) -> Preview | None:
        """The files' preview, opened when one has changed; None until both are there. Raises JobError."""
        with self._one:
            if (video, audio) != self.files:
                self._open.close()
                self._preview, self.files = None, (video, audio)
                self.uploads |= {Path(f) for f in self.files if f}
                if video and audio:
                    self._preview = self._open.enter_context(self.service.preview(self.job({})))
            return self._preview

    def render(self, values: dict[str, Any]) -> Iterator[tuple[str, float] | dict[str, Any]]:
        """(stage, share) while the job runs, then its body."""
        news: queue.Queue[Any] = queue.Queue()
        self.control = control = Control(self.service.settings.job_deadline_sec, lambda *at: news.put(at))
        job = {**self.job(values), "musetalk_job_id": f"page-{self.folder.name}-{uuid.uuid4().hex[:8]}"}
        threading.Thread(target=lambda: news.put(self.service.run_job(job, control=control)), daemon=True).start()
        while not isinstance(item := news.get(), dict):
            yield item
        if item["status"] == "success":
            made = Path(item["output_url"].removeprefix("file://"))
            item = {**item, "file": shutil.move(made, self.folder / made.name)}
        yield item

    def stop(self) -> None:
        """Cancel the running job."""
        if self.control is not None:
            self.control.cancel()

    def close(self, others: Iterable[Session]) -> None:
        """The tab is gone: end its job, delete its files; equal uploads of several tabs are one file."""
        self.stop()
        self._open.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.uploads - {p for other in others for p in other.uploads}:
            path.unlink(missing_ok=True)


# -- controls from the schema ----------------------------------------------------------------------------------------


def control_of(name: str, field: FieldInfo) -> gr.components.Component:
    """The control for a field: its type picks the kind, its description is the help."""
    label, given, kind = name.replace("_", " "), {"value": field.default, "info": field.description}, field.annotation
    kinds = [k for k in get_args(kind) if k is not type(None)] if get_origin(kind) not in (Literal, None) else [kind]
    words = [w for k in kinds if get_origin(k) is Literal for w in get_args(k)]
    limits = {type(m).__name__: getattr(m, type(m).__name__.lower()) for k in (field, *kinds) for m in _limits(k)}
    if kind is bool:
        return gr.Checkbox(label=label, **given)
    if words:
        free = any(get_origin(k) is not Literal for k in kinds)
        return gr.Dropdown(words, label=label, allow_custom_value=free, **given)
    if kind is str:
        return gr.Textbox(label=label, **given)
    low, high = limits.get("Ge"), limits.get("Le")
    whole = kind is not float
    if field.default is None or low is None or high is None:
        return gr.Number(label=label, precision=0 if whole else None, minimum=low, **given)
    return gr.Slider(low, high, step=1 if whole else 0.01, label=label, **given)


def _limits(kind: Any) -> list[Any]:
    found = [*getattr(kind, "metadata", ()), *getattr(kind, "__metadata__", ())]
    inner = [m for f in found for m in getattr(f, "metadata", ())]
    return [m for m in (*found, *inner) if type(m).__name__ in ("Ge", "Le")]


def request_of(values: dict[str, Any]) -> dict[str, Any]:
    """The request's fields that differ from their defaults; whole numbers from sliders as integers."""
    said: dict[str, Any] = {}
    for name, value in values.items():
        field = FIELDS[name]
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if isinstance(value, float) and field.annotation is not float:
            value = int(value)
        if name == "fps" and value is not None:
            value = float(value)
        if value not in (None, "", field.default):
            said[name] = value
    params = {n: v for n, v in said.items() if n not in SHAPE}
    return {**{n: said[n] for n in SHAPE if n in said}, **({"params": params} if params else {})}


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


def stage_bar(shares: dict[str, float]) -> str:
    """Shares of the whole as one bar."""
    total = sum(shares.values()) or 1
    return "<div class=bar>" + "".join(
        f"<span style='width:{share / total:.1%}' title='{name} {share:.2f}'>{name}</span>"
        for name, share in shares.items() if share) + "</div>"


def outlined(shown: Shown) -> np.ndarray:
    """The film's frame with the edge of the blended region drawn on it."""
    picture = shown.film.copy()
    if shown.region is not None and shown.region.mask.numel():
        box, inside = shown.region.box, np.pad(shown.region.mask.numpy() > 0, 2)
        inner = inside[:-4, 2:-2] & inside[4:, 2:-2] & inside[2:-2, :-4] & inside[2:-2, 4:]
        picture[box.y1 : box.y2, box.x1 : box.x2][inside[2:-2, 2:-2] & ~inner] = GREEN
    return picture


def as_curl(request: dict[str, Any]) -> tuple[str, str]:
    """The request as JSON, and as a command for the HTTP door; the files' places are to be filled in."""
    body = {**request, "musetalk_job_id": "job-1", "video_url": "https://HOST/clip", "audio_url": "https://HOST/speech"}
    text = json.dumps(body, indent=2)
    return text, f"curl -s http://localhost:8000/generate -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


# -- the page --------------------------------------------------------------------------------------------------------


def controls() -> dict[str, gr.components.Component]:
    """All fields of the request but the files, in groups; what no group names is folded."""
    made: dict[str, gr.components.Component] = {}
    for title, names in GROUPS.items():
        with gr.Accordion(title, open=title == "Mouth"):
            for name in names:
                made[name] = control_of(name, FIELDS[name])
    return made


def show(session: Session, clip: str | None, webcam: str | None, speech: str | None, second: float, outline: bool,
         *values: Any) -> tuple[Any, ...]:
    """What every change leads to: the frame, before and after; a notice; the request; how far the scrubber goes."""
    chosen = dict(zip(ORDER, values, strict=True))
    request = request_of(chosen)
    try:
        preview = session.load(clip or webcam, speech)
        if preview is None:
            return gr.skip(), gr.skip(), EMPTY, *as_curl(request), gr.skip()
        shown = preview.frame(parse(session.job(chosen)), second)
        note = "" if shown.region is not None else "No mouth is painted here: this frame shows no face, or a silence."
        film = outlined(shown) if outline else shown.film
        return shown.source, film, note, *as_curl(request), gr.update(maximum=round(preview.seconds, 2))
    except JobError as e:
        return gr.skip(), gr.skip(), failed(failure(e)), *as_curl(request), gr.skip()


def render(session: Session, *values: Any) -> Iterator[tuple[Any, ...]]:
    """Progress, then the film beside its source, the metrics and the stage times."""
    if not all(session.files):
        yield EMPTY, "", None
        return
    for news in session.render(dict(zip(ORDER, values, strict=True))):
        if isinstance(news, tuple):
            stage, share = news
            yield f"{STAGES[stage]} {share:.0%}{stage_bar({stage: share, ' ': 1 - share})}", gr.skip(), gr.skip()
        elif news["status"] == "success":
            metrics = news["metrics"]
            table = [[k, v] for k, v in metrics.items() if k != "stage_times" and v is not None]
            yield f"done{stage_bar(metrics['stage_times'])}", pair(str(session.files[0]), news["file"]), table
        else:
            yield failed(news), gr.skip(), gr.skip()


def pair(source: str, film: str) -> str:
    """Source and film side by side; playing the film plays both."""
    still = Path(source).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff")
    left = f"<img src='/gradio_api/file={source}'>" if still else f"<video muted loop src='/gradio_api/file={source}'></video>"
    return f"<div class=pair>{left}<video id=film controls src='/gradio_api/file={film}'></video></div>"


def build(service: Service, root: Path) -> gr.Blocks:
    """The page over a service; sessions keep their files under `root`."""
    with gr.Blocks(title="MuseTalk worker", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        session, open_tabs = gr.State(None), dict[str | None, Session]()
        with gr.Row():
            with gr.Column(scale=1):
                with gr.Tab("Clip or still"):
                    clip = gr.File(label="video or picture", height=90)
                with gr.Tab("Webcam"):
                    webcam = gr.Video(sources=["webcam"], label="record a clip", height=240)
                speech = gr.Audio(type="filepath", sources=["upload", "microphone"], label="speech", buttons=[])
                samples = gr.Button("Use the samples", size="sm")
                chosen = controls()
            with gr.Column(scale=2):
                with gr.Row():
                    source = gr.Image(label="source", interactive=False, format="jpeg", buttons=[])
                    film = gr.Image(label="film", interactive=False, format="jpeg", buttons=[], elem_id="frame")
                with gr.Row():
                    second = gr.Slider(0, 10, 0.5, step=0.04, label="second of the film", scale=4)
                    outline = gr.Checkbox(label="outline what is blended", scale=1)
                notice = gr.HTML(EMPTY, elem_id="notice")
                with gr.Row():
                    go, stop = gr.Button("Render the film", variant="primary"), gr.Button("Stop", variant="stop")
                progress, result = gr.HTML(elem_id="progress"), gr.HTML(elem_id="result", js_on_load=LOCKSTEP)
                with gr.Accordion("Metrics", open=False):
                    metrics = gr.Dataframe(headers=["metric", "value"], interactive=False, show_label=False)
                with gr.Accordion("For production: the same request", open=False):
                    as_json, curl = gr.Code(language="json", label="JSON"), gr.Code(language="shell", label="curl")
        values = [chosen[n] for n in ORDER]
        inputs = [session, clip, webcam, speech, second, outline, *values]
        changes = [c.input for c in (second, outline, *values)]
        files = [clip.change, webcam.change, speech.change]
        gr.on([*changes, *files], show, inputs, [source, film, notice, as_json, curl, second], trigger_mode="always_last",
              show_progress="hidden", api_visibility="private")
        samples.click(lambda: (str(SAMPLES / "presenter.mp4"), str(SAMPLES / "speech.wav")), None, [clip, speech],
                      api_visibility="private")
        go.click(render, [session, *values], [progress, result, metrics], concurrency_limit=None, show_progress="hidden",
                 api_visibility="private")
        stop.click(lambda s: s.stop(), session, None, concurrency_limit=None, api_visibility="private")

        def begin(request: gr.Request) -> Session:
            open_tabs[request.session_hash] = Session(service, root)
            return open_tabs[request.session_hash]

        def end(request: gr.Request) -> None:
            if (gone := open_tabs.pop(request.session_hash, None)) is not None:
                gone.close(open_tabs.values())

        page.load(begin, None, session, api_visibility="private")
        page.unload(end)
    return page


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.page", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args(argv)
    logs.setup("ERROR")
    with tempfile.TemporaryDirectory(prefix="musetalk-page-") as folder:
        root = Path(folder).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(root / "uploads")
        try:
            settings = Settings.for_shell().model_copy(update={
                "storage": "local", "local_storage_dir": root / "films", "local_input_root": root})
        except BadSetting as e:
            parser.exit(1, f"error: {e}\n")
        service = Service(settings)
        threading.Thread(target=service.engine.warm_up, daemon=True).start()
        fonts = ["system-ui", "sans-serif"]
        build(service, root).launch(
            server_name=options.host, server_port=options.port, share=False, quiet=True,
            allowed_paths=[str(root), str(SAMPLES)], max_file_size=f"{settings.max_download_mb:g}mb", css=CSS,
            footer_links=[], enable_monitoring=False,
            theme=gr.themes.Default(font=fonts, font_mono=["monospace"]), ssr_mode=False, mcp_server=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
