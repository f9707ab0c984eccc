"""The worker for people at a shell: python -m pipeline VIDEO AUDIO [VIDEO AUDIO ...] -o out.mp4."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin
from urllib.parse import unquote, urlsplit

from pipeline import __version__
from pipeline.errors import BadRequest
from pipeline.job import bar, logs
from pipeline.job.control import Control
from pipeline.job.imports import kept
from pipeline.schema import JOB_ID, FindFaces, Format, Params, parse
from pipeline.settings import BadSetting, Settings

if TYPE_CHECKING:
    from pipeline.run import Service


FORMATS = get_args(Format)
LONGEST_NAME = 255  # bytes that a file's name may have


class BadUse(ValueError):
    """The command line asks for what cannot be done; the message says why."""


@dataclass(frozen=True)
class Film:
    """One video and one speech or several (see `speaker`), and the film to be made of them; without a speech, the JPEG of the
    people in the video.
    """

    video: str
    audio: str
    output: Path
    speakers: tuple[dict[str, Any], ...] = ()


def options() -> argparse.ArgumentParser:
    """The command line: every key of `params` is an option."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline", description="Make the face in VIDEO speak AUDIO.",
        usage="python -m pipeline VIDEO AUDIO [VIDEO AUDIO ...] [-o OUTPUT] [options]",
        epilog="Exit code: 0 done, 1 the worker failed, 2 the input is at fault, 130 interrupted.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34))
    parser.add_argument("inputs", nargs="+", metavar="VIDEO AUDIO",
                        help="files or URLs, in pairs; either may be a video, VIDEO a still")
    add = parser.add_argument
    add("-o", "--output", help="film to write (.mp4, .webm, .mov), or a folder (default: out.mp4)")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--preview", action="store_true", help="the first second only, to tune the options")
    add("--estimate", action="store_true", help="make nothing: say how long it would take")
    add("--speaker", action="append", default=[], metavar="AUDIO@FACE@START",
        help="instead of AUDIO, repeated; FACE as --face or X,Y:SECOND")
    add("--faces", action="store_true", help="list the people of VIDEO, in a JPEG with numbers; no film")
    add("--model-dir", metavar="DIR", help="folder of weights (default: MODEL_DIR or models/demo)")
    add("--device", choices=("auto", "cpu", "cuda"), help="where to compute (default: DEVICE or auto)")
    add("--json", action="store_true", help="print each job's body, one a line")
    add("--quiet", action="store_true", help="errors only: no progress bar, no summary")
    add("--version", action="version", version=f"musetalk-worker {__version__}")
    add = parser.add_argument_group("picture and mouth").add_argument
    add("--aspect-ratio", metavar="W:H", default="source", help="source or W:H")
    add("--resolution", metavar="SIZE", default="source", help="source, 720p (short side) or WxH")
    for name, field in Params.model_fields.items():
        flag, shown = "--" + name.replace("_", "-"), str(field.description).replace("%", "%%")
        if field.annotation is bool:
            add(flag, action="store_true", default=None, help=shown)
            continue
        if field.default is not None:
            shown += f" (default: {field.default})"
        add(flag, help=shown, **_values(field.annotation))
    return parser


def _values(kind: Any) -> dict[str, Any]:
    """What an option of such a type takes."""
    choices = [k for k in (kind, *get_args(kind)) if get_origin(k) is Literal]
    if str in (kind, *get_args(kind)):
        return {"metavar": "RRGGBB"}
    numbers = [k for k in get_args(kind) if k not in (*choices, type(None))] if get_origin(kind) is Union else []
    if choices and not numbers:
        return {"choices": get_args(choices[0])}
    return {"type": _number_or_word, "metavar": "WHICH" if choices else "N"}


def _number_or_word(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def speaker(text: str) -> dict[str, Any]:
    """One of a request's speakers, as AUDIO@FACE@START says it; raises BadUse."""
    try:
        audio, face, start = text.rsplit("@", 2)
        said: dict[str, Any] = {"audio_url": audio, "face": _number_or_word(face), "start": float(start)}
        if "," in face:
            place, _, second = face.partition(":")
            numbers = [float(n) for n in place.split(",")]
            said["face"] = {{2: "point", 4: "box"}[len(numbers)]: numbers, "second": float(second or 0)}
        return said
    except (ValueError, KeyError):
        raise BadUse(f"--speaker {text}: give AUDIO@FACE@START, as anna.wav@leftmost@0 or bela.wav@410,120:2.5@3") from None


def single(video: list[str], speakers: list[str], faces: bool, output: str, overwrite: bool,
           form: str | None = None) -> list[Film]:
    """The one output of a command line with speakers, or that lists faces; raises BadUse."""
    if len(video) != 1 or (faces and speakers):
        raise BadUse("--speaker and --faces take one VIDEO and no AUDIO, and one of the two is given; "
                     f"{len(video)} inputs are given")
    if not faces:
        (film,) = films([video[0], video[0]], output, overwrite, form)
        return [replace(film, audio="", speakers=tuple(speaker(text) for text in speakers))]
    path = Path(output)
    if path.suffix.lower() not in (".jpg", ".jpeg"):
        raise BadUse(f"-o {output}: with --faces a JPEG is written; name a file that ends in .jpg")
    if path.exists() and not overwrite:
        raise BadUse(f"-o {output}: the file exists; give --overwrite to replace it")
    return [Film(video[0], "", path)]


def films(inputs: list[str], output: str, overwrite: bool, form: str | None = None) -> list[Film]:
    """The films a command line asks for, `form` being the format that it names; raises BadUse for outputs that cannot be."""
    if len(inputs) % 2:
        raise BadUse(f"VIDEO and AUDIO come in pairs, but {len(inputs)} inputs are given")
    pairs, path = list(zip(inputs[::2], inputs[1::2])), Path(output)
    folder = path.is_dir() or output.endswith(os.sep) or (len(pairs) > 1 and not path.suffix)
    if len(pairs) > 1 and not folder:
        raise BadUse(f"-o {output}: several pairs need a folder: -o FOLDER{os.sep}")
    if not folder and output != output.strip():
        raise BadUse(f"-o {output!r}: the name begins or ends with a blank; leave it out")
    named = path.suffix.lower()[1:]
    if not folder and (named not in FORMATS or form not in (None, named)):
        wanted = f"{form.upper()} is written; name a file that ends in .{form}" if form else (
            "MP4, WebM or MOV is written; name a file that ends in .mp4, .webm or .mov")
        raise BadUse(f"-o {output}: {wanted}, or a folder as {output}{os.sep}")
    made = [Film(video, audio, _named(video, audio, path, pairs, form or "mp4") if folder else path) for video, audio in pairs]
    for film in made:
        if len(os.fsencode(film.output.name)) > LONGEST_NAME:
            raise BadUse(f"-o {film.output}: the name has more than {LONGEST_NAME} bytes; name a shorter one")
        if film.output.exists() and not overwrite:
            raise BadUse(f"-o {film.output}: the file exists; give --overwrite to replace it")
        if sum(film.output == other.output for other in made) > 1:
            raise BadUse(f"{film.output} would be written twice: give two calls, or inputs with other names")
    return made


def check(film: Film, arguments: argparse.Namespace) -> None:
    """Raises BadUse for files that are not there and options that are out of range, as the worker would after loading."""
    speeches = [each["audio_url"] for each in film.speakers] or ([] if arguments.faces else [film.audio])
    for name, text in (("VIDEO", film.video), *(("AUDIO", speech) for speech in speeches)):
        if "://" not in text and not Path(text).is_file():
            found = "a folder" if Path(text).is_dir() else "a pipe or a device" if Path(text).exists() else ""
            raise BadUse(f"{name}: {f'{found}, not a file' if found else 'no such file'}: {text}")
    if arguments.stream and not re.fullmatch(JOB_ID, film.output.stem):
        raise BadUse(f"-o {film.output}: with --stream the name may hold A-Z a-z 0-9 . _ - only")
    try:
        job = job_of(film, arguments)
        _ = FindFaces.asked(job) or parse(job)
    except BadRequest as e:
        raise BadUse(plain(e.message)) from None


def job_of(film: Film, arguments: argparse.Namespace) -> dict[str, Any]:
    """The job that makes a film."""
    params = {n: v for n in Params.model_fields if (v := getattr(arguments, n)) is not None}
    if film.output.suffix.lower() != ".mp4" and not arguments.faces:
        params["format"] = film.output.suffix.lower()[1:]
    if isinstance(params.get("fps"), int):
        params["fps"] = float(params["fps"])
    if arguments.faces:
        return {"find_faces": True, "musetalk_job_id": "cli", "video_url": _source(film.video)}
    speech: dict[str, Any] = {"audio_url": _source(film.audio)}
    if film.speakers:
        speech = {"speakers": [{**each, "audio_url": _source(each["audio_url"])} for each in film.speakers]}
    name = film.output.stem if arguments.stream else "cli"  # a stream lies beside the film from the first, under its name
    return {"musetalk_job_id": name, "video_url": _source(film.video), **speech,
            "aspect_ratio": arguments.aspect_ratio, "resolution": arguments.resolution, "params": params,
            **({"estimate": True} if arguments.estimate else {})}


def plainly_named(film: Film, folder: Path) -> Film:
    """The film with links in a folder for files whose names a request cannot hold: with a blank at the end, or no UTF-8."""
    def linked(text: str) -> str:
        if "://" in text or text == _utf8(text).rstrip():
            return text
        link = folder / hashlib.sha256(os.fsencode(text)).hexdigest()
        with suppress(FileExistsError):
            link.symlink_to(Path(text).absolute())
        return str(link)

    return replace(film, video=linked(film.video), audio=linked(film.audio), speakers=tuple(
        {**each, "audio_url": linked(each["audio_url"])} for each in film.speakers))


def plain(message: str) -> str:
    """A failure's message with the command line's names in place of the request's."""
    message = re.sub(r"\bvideo_url\b", "VIDEO", re.sub(r"\baudio_url\b", "AUDIO", message))
    message = message.replace("LOCAL_STORAGE_DIR", "-o")
    message = re.sub(r"\bspeakers\.(\d+)\.", lambda m: f"--speaker {int(m[1]) + 1}, ", message)
    return re.sub(r"\bparams\.(\w+)|^(aspect_ratio|resolution)(?=:)",
                  lambda m: "--" + (m[1] or m[2]).replace("_", "-"), message)


def _named(video: str, audio: str, folder: Path, pairs: list[tuple[str, str]], form: str) -> Path:
    """The clip's name in the folder, with the speech's where the clip speaks several."""
    name, speech = (Path(unquote(re.split("[?#]", text)[0]) if "://" in text else text).stem for text in (video, audio))
    alone = sum(video == other for other, _ in pairs) == 1
    return folder / f"{name if alone else f'{name}-{speech}'}.{form}"


@contextmanager
def working_folder(output: Path) -> Iterator[Path]:
    """A folder on the output's disk for what is being made: whether it can be written is known before any work.

    The output's folder is made where it is missing, and removed again when nothing was written to it.
    """
    missing = [p for p in (output.parent, *output.parent.parents) if not p.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".musetalk-", dir=output.parent)
    except OSError as e:
        raise BadUse(f"-o {output}: cannot be written: {e.strerror}") from None
    try:
        with folder as name:
            yield Path(name)
    finally:
        with suppress(OSError):  # it holds something
            for made in missing:
                made.rmdir()


def asked(arguments: argparse.Namespace) -> list[Film]:
    """The films of a command line, looked at before anything is loaded; raises BadUse."""
    for name in ("estimate", "stream"):
        if arguments.faces and getattr(arguments, name):
            raise BadUse(f"--{name} is of a film, and --faces makes none; leave one of them out")
    output = arguments.output or ("faces.jpg" if arguments.faces else f"out.{arguments.format or 'mp4'}")
    overwrite = arguments.overwrite or arguments.estimate  # which writes nothing
    if arguments.speaker or arguments.faces:
        made = single(arguments.inputs, arguments.speaker, arguments.faces, output, overwrite, arguments.format)
    else:
        made = films(arguments.inputs, output, overwrite, arguments.format)
    for film in made:
        check(film, arguments)
    return made


def run(arguments: argparse.Namespace) -> int:
    """Make all films with one model; the exit code is the first failure's."""
    try:
        made = asked(arguments)
    except OSError as e:  # a name that is too long, a folder that nobody may look into
        raise BadUse(f"{e.filename}: {e.strerror}") from None
    given = {"MODEL_DIR": arguments.model_dir, "DEVICE": arguments.device}
    settings = Settings.for_shell(**{k: v for k, v in given.items() if v})
    written: list[Path] = []
    codes = []
    with working_folder(made[0].output) as folder:
        try:
            with kept():  # torch takes its time: not before the command line is understood
                from pipeline.run import Service

            service = Service(settings.model_copy(update={
                "storage": "local", "local_storage_dir": made[0].output.parent if arguments.stream else folder,
                "local_input_root": Path("/")}))
            for film in made:
                codes.append(_film(service, plainly_named(film, folder), arguments, written))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"written: {', '.join(map(str, written))}" if written else "") from None
    return next((code for code in codes if code), 0)


def _film(service: Service, film: Film, arguments: argparse.Namespace, written: list[Path]) -> int:
    drawn, told = bar.on_terminal() and not arguments.quiet, arguments.quiet

    def progress(stage: str, share: float) -> None:
        nonlocal told
        if control.playlist_url and not told:
            print(f"{chr(10) * drawn}can be played: {control.playlist_url}", file=sys.stderr)
            told = True
        if drawn:
            bar.draw(stage, share)

    control = Control(service.settings.job_deadline_sec, progress)
    new = arguments.stream and not (stream := film.output.with_suffix(".hls")).exists()
    try:
        body = service.run_job(job_of(film, arguments), control=control, preview=arguments.preview)
    except BaseException:  # a signal ends it
        if new:
            shutil.rmtree(stream, ignore_errors=True)
        raise
    if body["status"] == "success" and not arguments.estimate:
        Path(unquote(urlsplit(body["output_url"]).path)).replace(film.output)
        written.append(film.output)
        body["output_url"] = film.output.resolve().as_uri()
    elif drawn:
        print(file=sys.stderr)  # the bar's line is not at its end
    return _tell(body, film, arguments)


def _tell(body: dict[str, Any], film: Film, arguments: argparse.Namespace) -> int:
    """Say how it went; exit code: 0 done, 1 the worker failed, 2 the input is at fault."""
    if arguments.json:
        print(json.dumps(body), flush=True)
    if body["status"] != "success":
        several = f"{film.output}: " if len(arguments.inputs) > 2 else ""
        print(f"error: {several}{plain(body['error_message'])}", file=sys.stderr)
        return 2 if body["error_type"] == "media_error" else 1
    if not arguments.json and not arguments.quiet:
        m = body["metrics"]
        if arguments.estimate:
            known = "the avatar is cached" if m["avatar_cached"] else "if the clip holds the face, which was not searched"
            print(f"{film.output}: {m['frames']} frames would take about {m['estimate']['seconds']:.1f} s, {known}", flush=True)
            return 0
        if arguments.faces:
            print(faces_table(m["faces"]), f"{film.output}: people: {len(m['faces'])}", sep="\n", flush=True)
            return 0
        print(f"{film.output}: {m['frames']} frames in {m['total_time']:.1f} s "
              f"({m['GENERATION_TIME_SEC']:.1f} s of them generation)", flush=True)
    return 0


def faces_table(faces: list[dict[str, Any]]) -> str:
    """The people of a clip, a line each."""
    rows = [("number", "first", "last", "share", "best", "box")]
    rows += [(str(f["number"]), f"{f['first_second']:.2f}", f"{f['last_second']:.2f}", f"{f['share']:.2f}",
              f"{f['best_second']:.2f}", ",".join(map(str, f["box"]))) for f in faces]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def _source(text: str) -> str:
    """A URL as it is, a path made absolute."""
    return text if "://" in text else _utf8(str(Path(text).absolute()))


def _utf8(text: str) -> str:
    """A text without what is no UTF-8, as some files' names are."""
    return text.encode(errors="replace").decode()


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the worker failed, 2 the input is at fault. Raises KeyboardInterrupt that says what was written."""
    arguments = options().parse_args(argv)
    logs.setup("CRITICAL")
    try:
        return run(arguments)
    except (BadUse, BadSetting, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, BadUse) else 1
