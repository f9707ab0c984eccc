"""What one browser tab holds: its files, the preview that is open, and a thread that does one thing after another for it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from PIL import Image

from pipeline.film.preview import Heard, Picture, Preview, Sight
from pipeline.job.control import Control
from pipeline.page.controls import job_of
from pipeline.run import Service, failure
from pipeline.schema import parse
from pipeline.settings import asset

T = TypeVar("T")
SAMPLES = asset("samples")


@dataclass(frozen=True)
class Chosen:
    """A clip or a speech: the file, and the name that its owner knows it by."""

    path: Path
    name: str


SPEECH = Chosen(SAMPLES / "speech.wav", "speech.wav")  # until another one is chosen


@dataclass
class Speech:
    """A speech of the film: its file, its face as a request names it (None: not picked), and the second at which it begins."""

    chosen: Chosen
    face: dict[str, Any] | None = None
    start: float = 0.0


@dataclass(frozen=True)
class Pictures:
    """The source's frame and the film's as addresses, their size, the faces there, how long the film is, its speeches, and
    whether a mouth was painted.
    """

    source: str
    film: str
    size: tuple[int, int]
    faces: tuple[Sight, ...]
    seconds: float
    speeches: list[Heard]
    painted: bool


class Tab:
    """The files of a tab are served under names that nobody can guess, and deleted when it closes."""

    def __init__(self, service: Service, root: Path) -> None:
        self.service, self.id = service, uuid.uuid4().hex
        self.folder = root / self.id
        self.clip = Chosen(SAMPLES / "presenter.mp4", "presenter.mp4")
        self.speeches = [Speech(SPEECH)]
        self.stage, self.share = "", 0.0  # of what the thread is doing
        self.closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tab")
        self._served: dict[str, Path] = {}
        self._streams: list[Path] = []  # folders of films' streams
        self._control = self._asked = self._new_control()  # of what the thread is doing; of the film that was asked for last
        self._open = contextlib.ExitStack()
        self._preview: tuple[dict[str, Any], Preview] | None = None  # and the job that it was opened for

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do something in the tab's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def new_file(self, suffix: str) -> Path:
        """A path for another file of this tab."""
        self.folder.mkdir(exist_ok=True)
        return self.folder / f"{uuid.uuid4().hex}{suffix if re.fullmatch(r'[.][A-Za-z0-9]{1,8}', suffix) else ''}"

    def serve(self, path: Path) -> str:
        """The address of a file."""
        name = uuid.uuid4().hex + path.suffix
        self._served[name] = path
        return f"/files/{self.id}/{name}"

    def served(self, name: str) -> Path | None:
        """The file behind an address, if it is still there."""
        path = self._served.get(name)
        return path if path is not None and path.is_file() else None

    def job(self, request: dict[str, Any]) -> dict[str, Any]:
        """The job that the files and the tuned fields of a request describe."""
        return job_of(request, f"page-{uuid.uuid4().hex}", str(self.clip.path),
                      [(str(s.chosen.path), s.face, s.start) for s in self.speeches])

    def pictures(self, request: dict[str, Any], second: float, outline: bool) -> Pictures | dict[str, Any]:
        """A moment's frame before and after, in place of those shown before; or a failure's body."""
        control = self._begin(self._new_control())
        try:
            preview = self._opened()
            shown = preview.frame(parse(self.job(request)), second, control, with_faces=True)
        except Exception as e:  # every failure is told as the service tells it
            return failure(e)
        for name, path in list(self._served.items()):
            if path.suffix == ".jpg":
                path.unlink(missing_ok=True)
                del self._served[name]
        source, film = self._picture(shown.source), self._picture(shown.outlined() if outline else shown.film)
        height, width = shown.source.shape[:2]
        return Pictures(source, film, (width, height), shown.faces, shown.seconds, preview.speeches, bool(shown.regions))

    async def film(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run the job after what the thread is at. The body of a success has the film's address as its output_url."""
        self._asked = self._new_control()
        return await self.run(self._film, request, self._asked)

    def _film(self, request: dict[str, Any], control: Control) -> dict[str, Any]:
        self._begin(control)
        body = self.service.run_job(self.job(request), control=control)
        if control.playlist_url:
            self._streams.append(Path(unquote(urlsplit(control.playlist_url).path)).parent)
        if body["status"] == "success":
            path = self.new_file(Path(body["output_url"]).suffix)
            shutil.move(unquote(urlsplit(body["output_url"]).path), path)
            body["output_url"] = self.serve(path)
        return body

    @property
    def playable(self) -> str:
        """How much of the film that is made can be played, and where; empty while nothing can."""
        control = self._control
        return f"{control.ready_sec:.0f} s can be played: {control.playlist_url}" if control.playlist_url else ""

    def stop(self) -> None:
        """Ask what the thread is doing to end, and the film that waits for it not to begin."""
        self._control.cancel()
        self._asked.cancel()

    def close(self) -> None:
        """The tab is gone: its job ends, then its files are deleted. Returns at once."""
        if not self.closed:
            self.closed = True
            self.stop()
            self._thread.submit(self._clean_up)
            self._thread.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until a closed tab has left nothing behind."""
        self._thread.shutdown()

    def _new_control(self) -> Control:
        return Control(self.service.settings.job_deadline_sec, self._progress)

    def _begin(self, control: Control) -> Control:
        self.stage, self.share, self._control = "", 0.0, control
        if self.closed:
            control.cancel()
        return control

    def _progress(self, stage: str, share: float) -> None:
        self.stage, self.share = stage, share

    def _opened(self) -> Preview:
        """The preview of the chosen files and faces."""
        job = {**self.job({}), "musetalk_job_id": self.id}
        if self._preview is None or self._preview[0] != job:
            self._preview = None
            self._open.close()
            self._preview = job, self._open.enter_context(self.service.preview(job))
        return self._preview[1]

    def _picture(self, pixels: Picture) -> str:
        path = self.new_file(".jpg")
        Image.fromarray(pixels).save(path, quality=90)
        return self.serve(path)

    def _clean_up(self) -> None:
        self._open.close()
        self._served.clear()
        for folder in (self.folder, *self._streams):
            shutil.rmtree(folder, ignore_errors=True)
