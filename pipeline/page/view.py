"""The page as one browser tab sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nicegui import events, ui

from pipeline.film.preview import Sight
from pipeline.page.controls import FIELDS, GROUPS, as_curl, control_of, explained, metrics_table, request_of, stage_bar
from pipeline.page.tab import SPEECH, Chosen, Pictures, Speech, Tab
from pipeline.page.timeline import timeline

TAKES = {"clip": ("Clip or still", "video/*,image/*", "videocam"), "speech": ("Speech", "audio/*,video/*", "mic")}
MOST = 6  # speakers
STILLS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff", ".avif", ".heic")
DOING = {  # what comes after the stage that the job has told of
    "": "reading the files", "download": "checking the files", "validation": "preparing the clip", "upload": "finishing"}
HEAD = Path(__file__).with_name("head.html").read_text()


class View:
    """The page's elements and what they do. Of changes that come while a frame is made, the last one counts."""

    def __init__(self, tab: Tab, max_upload: int) -> None:
        self.tab, self.max_upload = tab, max_upload
        self.picking = 0  # the speech that the next click on a face is for
        self.sights: tuple[Sight, ...] = ()  # the faces on the source
        self.uploads, self.listen, self.badges = list[ui.upload](), list[ui.element](), list[ui.button]()  # of each speech
        self.rendering = self.looking = self.changed = False
        ui.add_head_html(HEAD)
        with ui.element("header").classes("head"):
            ui.label("MuseTalk worker").classes("title")
            ui.label("Make the face in a clip or a still speak: choose both files, tune the mouth by eye, render the film.")
        with ui.element("div").classes("layout"):
            with ui.element("section").classes("files"):
                self._files()
            with ui.element("section").classes("stage"):
                self._stage()
            with ui.element("section").classes("controls"):
                self.controls = self._controls()
        self.timer = ui.timer(0.1, self._tell)
        ui.timer(0, self.refresh, once=True)  # a timer begins when the browser is there

    # -- what it is made of

    def _files(self) -> None:
        self.clip = self._upload("clip", "clip")
        self._speeches()
        ui.label("Press + or drop a file on it, or record one.").classes("help")

    @ui.refreshable_method
    def _speeches(self) -> None:
        """The speeches, made anew when one comes or goes."""
        self.uploads, self.listen, self.badges = [], [], []
        several = len(self.tab.speeches) > 1
        for number, speech in enumerate(self.tab.speeches, 1):
            name = "speech" if number == 1 else f"speech-{number}"
            with ui.column().classes(f"w-full gap-1 who-{number} {'speaker' if several else ''}"):
                self.uploads.append(self._upload("speech", name, number - 1))
                self.listen.append(ui.element("audio").props(f"controls id={name}"))
                if several:
                    self.badges.append(self._part(number, speech))
        if len(self.tab.speeches) < MOST:
            ui.button("Add a speaker", icon="person_add", on_click=self._add).props("flat dense no-caps").classes("self-start")
        self._show_choice()

    def _upload(self, kind: str, name: str, place: int = 0) -> ui.upload:
        _, accept, icon = TAKES[kind]
        with ui.row().classes("w-full items-center no-wrap gap-2"):
            upload = ui.upload(auto_upload=True, max_file_size=self.max_upload, on_rejected=self._refused,
                               on_upload=lambda e: self._uploaded(kind, place, e))
            upload.on("failed", lambda: self._lost(upload), args=[])
            upload.props(f'accept="{accept}" flat bordered color=grey-2 text-color=dark id=upload-{name}').classes("grow")
            ui.button(icon=icon).props(f'flat round aria-label="record {name}"').on(
                "click", js_handler=f"e => record('{name}', getElement({upload.id}).$refs.qRef, e.currentTarget)")
        return upload

    def _part(self, number: int, speech: Speech) -> ui.button:
        """Of one of several speeches: whose it is, and when it begins."""
        async def begin(event: events.ValueChangeEventArguments[float | None]) -> None:
            speech.start = float(event.value or 0.0)
            await self.refresh()

        with ui.row().classes("w-full items-center no-wrap gap-2"):
            badge = ui.button(f"face {number}", color=None, on_click=lambda: self._aim(number - 1))
            badge.props("unelevated dense no-caps").classes("badge")
            ui.label("click it in the picture").classes("help grow")
            ui.number("begins at", value=speech.start, min=0, step=0.1, suffix="s", on_change=begin).props(
                f'dense aria-label="start {number}"').classes("w-24")
            ui.button(icon="close", on_click=lambda: self._remove(speech)).props(
                f'flat round dense aria-label="remove speaker {number}"')
        return badge

    def _stage(self) -> None:
        with ui.element("div").classes("pair"):
            (self.source, self.faces), (self.frame, _) = self._picture("source"), self._picture("film")
        with ui.row().classes("w-full items-center no-wrap gap-4"):
            ui.label("second")
            with ui.column().classes("grow gap-0"):
                self.time = ui.html().classes("w-full").props("id=time")
                self.second = ui.slider(min=0, max=10, step=0.04, value=0.5, on_change=self.refresh).props(
                    'label aria-label="second of the film"')
            self.outline = ui.checkbox("outline", on_change=self.refresh)
        self.notice = ui.label().props("id=notice")
        self.render = ui.button("Render the film", icon="movie", on_click=self.make).classes("w-full")
        self.render.props("size=lg unelevated no-caps")
        with ui.row().classes("w-full items-center no-wrap") as self.running:
            self.bar = ui.linear_progress(0, show_value=False, size="10px").classes("grow")
            ui.button("Stop", on_click=self.tab.stop).props("outline no-caps color=grey-8")
        self.running.set_visibility(False)
        self.progress = ui.label().props("id=progress")
        self.result = ui.column().classes("w-full gap-2").props("id=result")
        with ui.expansion("For production: the same request").classes("w-full"):
            self.codes = {name: self._code(name) for name in ("JSON", "curl")}

    def _picture(self, name: str) -> tuple[ui.element, ui.element]:
        """A picture, and what lies over it."""
        with ui.element("figure"):
            with ui.element("div").classes("picture"):
                picture = ui.element("img").props(f'id={name}-frame alt="{name}"')
                over = ui.element("div")
            with ui.element("figcaption"):
                ui.label(name)
        return picture, over

    def _code(self, name: str) -> ui.label:
        copy = ui.button(f"Copy {name}", icon="content_copy").props("flat dense no-caps")
        code = ui.label().classes("code").props(f"id={name}")
        copy.on("click", js_handler=f"() => navigator.clipboard.writeText(document.getElementById('{name}').textContent)")
        copy.on_click(lambda: ui.notify(f"{name} is copied"))
        return code

    def _controls(self) -> dict[str, Any]:
        made = {}
        for title, names in GROUPS.items():
            with ui.expansion(title, value=title == "Mouth").classes("w-full").props("dense header-class=group"):
                made.update({n: control_of(n, FIELDS[n]) for n in names})
        for control in made.values():
            control.on_value_change(self.refresh)
        return made

    # -- what it does

    async def _uploaded(self, kind: str, place: int, event: events.UploadEventArguments) -> None:
        path = self.tab.new_file(Path(event.file.name).suffix)
        await event.file.save(path)
        if self.tab.closed:
            path.unlink(missing_ok=True)
            return
        chosen = Chosen(path, event.file.name)
        if kind == "clip":
            self.tab.clip = chosen
            self.clip.reset()
            for speech in self.tab.speeches:
                speech.face = None
        elif place < len(self.tab.speeches):
            self.tab.speeches[place].chosen = chosen
            self.uploads[place].reset()
        self._show_choice()
        await self.refresh()

    async def _add(self) -> None:
        """One more speech, whose face is the next one from the left until another is picked."""
        self.tab.speeches.append(Speech(SPEECH))
        self.picking = len(self.tab.speeches) - 1
        self._speeches.refresh()
        await self.refresh()

    async def _remove(self, speech: Speech) -> None:
        self.tab.speeches.remove(speech)
        self.picking = 0
        self._speeches.refresh()
        await self.refresh()

    def _aim(self, place: int) -> None:
        """The next click on a face is for that speech."""
        self.picking = place
        self._show_choice()

    async def _pick(self, face: Sight) -> None:
        """A face was clicked; if another speech has it, both change."""
        speeches, now = self.tab.speeches, next((f for f in self.sights if f.speech == self.picking), None)
        if face.speech is not None and face.speech != self.picking:
            speeches[face.speech].face = now.named if now else speeches[self.picking].face
        speeches[self.picking].face = face.named
        await self.refresh()

    def _show_choice(self) -> None:
        chosen = [("clip", self.clip, self.tab.clip),
                  *(("speech", upload, speech.chosen) for upload, speech in zip(self.uploads, self.tab.speeches, strict=True))]
        for kind, upload, file in chosen:
            upload.props["label"] = f"{TAKES[kind][0]}: {file.name}"
        for audio, speech in zip(self.listen, self.tab.speeches, strict=True):
            audio.props["src"] = self.tab.serve(speech.chosen.path)
        for place, badge in enumerate(self.badges):
            badge.classes(**{"add" if place == self.picking else "remove": "picking"})

    def _refused(self) -> None:
        ui.notify(f"This file is not taken: larger than {self.max_upload / 1e6:g} MB, or of another kind.", type="warning")

    def _lost(self, upload: ui.upload) -> None:
        """The file did not arrive."""
        upload.reset()
        ui.notify("The file was not received: this machine's disk may be full, or the connection broke.", type="warning")

    def _request(self) -> dict[str, Any]:
        return request_of({name: control.value for name, control in self.controls.items()})

    async def refresh(self) -> None:
        """Show the request and the frame for what is chosen now."""
        for code, text in zip(self.codes.values(), as_curl(self.tab.job(self._request())), strict=True):
            code.text = text
        self.changed = True
        if self.looking:
            return
        self.looking = True
        try:
            while self.changed and not self.tab.closed:
                self.changed = False
                self._show(await self.tab.run(
                    self.tab.pictures, self._request(), float(self.second.value), self.outline.value))
        finally:
            self.looking = False

    def _show(self, made: Pictures | dict[str, Any]) -> None:
        if self.tab.closed:
            return
        if isinstance(made, dict):
            self._complain(self.notice, made)
            return
        self.source.props["src"], self.frame.props["src"] = made.source, made.film
        self.second.props["max"] = round(made.seconds, 2)
        self.time.content = timeline(made.speeches, made.seconds)
        self._outline(made)
        self.notice.classes(remove="bad").text = (
            "" if made.painted else "No mouth is painted here: this frame shows no face, or a silence.")

    def _outline(self, made: Pictures) -> None:
        """The faces on the source, where there is a choice: a click picks one."""
        self.faces.clear()
        self.sights = made.faces
        width, height = made.size
        with self.faces:
            for number, face in enumerate(made.faces if len(made.faces) > 1 else (), 1):
                box, who = face.box, "" if face.speech is None else str(face.speech + 1)
                button = ui.element("button").props(f'type=button aria-label="face {number} from the left"')
                button.classes(f"face who-{who}").on("click", lambda face=face: self._pick(face))
                button.style(f"left:{box.x1 / width:.2%};top:{box.y1 / height:.2%};"
                             f"width:{box.width / width:.2%};height:{box.height / height:.2%}")
                with button:
                    ui.label(who)

    def _complain(self, label: ui.label, body: dict[str, Any]) -> None:
        label.classes("bad").text = explained(body)
        if label is self.notice:
            self.faces.clear()
            for picture in (self.source, self.frame):
                picture.props.pop("src", None)
                picture.update()

    async def make(self) -> None:
        """Render the film; what was rendered before goes first."""
        self.result.clear()
        self.progress.classes(remove="bad")
        clip = self.tab.clip
        with self._busy():
            body = await self.tab.film(self._request())
        if self.tab.closed:
            return
        if body["status"] != "success":
            self._complain(self.progress, body)
            return
        self.progress.text = f"done in {body['metrics']['total_time']:.1f} s"
        with self.result:
            self._film(clip, body["output_url"], body["metrics"])

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self.rendering = True
        self.render.set_visibility(False)
        self.running.set_visibility(True)
        try:
            yield
        finally:
            self.rendering = False
            if not self.tab.closed:
                self.render.set_visibility(True)
                self.running.set_visibility(False)

    def _film(self, clip: Chosen, address: str, metrics: dict[str, Any]) -> None:
        """Source and film side by side; playing the film plays both."""
        still = clip.path.suffix.lower() in STILLS
        with ui.element("div").classes("pair"):
            ui.element("img" if still else "video").props(f"muted loop playsinline id=source src={self.tab.serve(clip.path)}")
            film = ui.element("video").props(f"controls playsinline id=film src={address}")
        for event in () if still else ("play", "pause", "seeked", "timeupdate"):
            film.on(event, js_handler="lockstep")
        with ui.row().classes("w-full items-center no-wrap"):
            download = ui.button("Download", icon="download").props(f"outline no-caps href={address}")
            download.props["download"] = Path(clip.name).stem + Path(address).suffix
            ui.html(stage_bar(metrics["stage_times"])).classes("grow")
        with ui.expansion("Metrics").classes("w-full"):
            ui.html(metrics_table(metrics))

    def _tell(self) -> None:
        """Say what is being done, as often as the timer asks."""
        tab = self.tab
        if not (self.rendering or self.looking):
            return
        waits = "waiting for another job" if tab.service.engine.ready else "loading the model"
        making = ", ".join(filter(None, (f"making the film: {tab.share:.0%}", tab.playable)))
        doing = making if tab.stage == "inference" else DOING.get(tab.stage, waits)
        if self.rendering:
            self.progress.text, self.bar.value = doing, tab.share if tab.stage == "inference" else 0.0
            if self.looking:
                self.notice.text = "The frame follows when the film is done."
        elif tab.stage == "waiting":
            self.notice.classes(remove="bad").text = f"{waits.capitalize()} ..."
