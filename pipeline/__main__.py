"""The worker for people at a shell: python -m pipeline VIDEO AUDIO [VIDEO AUDIO ...] -o out.mp4."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin
from urllib.parse import unquote, urlsplit

from pipeline import __version__
from pipeline.job import bar, logs
from pipeline.job.control import Control
from pipeline.schema import Params
from pipeline.settings import BadSetting, Settings

if TYPE_CHECKING:
    from pipeline.run import Service

INTERRUPTED = 130  # exit code of a program that Ctrl-C ended


class BadUse(ValueError):
    """The command line asks for what cannot be done; the message says why."""


@dataclass(frozen=True)
class Film:
    """One video and one speech, and the MP4 to be made of them."""

    video: str
    audio: str
    output: Path


def options() -> argparse.ArgumentParser:
    """The command line: every key of `params` is an option."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline", description="Make the face in VIDEO speak AUDIO.",
        epilog="VIDEO may be a still image, AUDIO a video's sound track; both may be URLs. Several pairs in one call load the "
               "model once. Exit code: 0 done, 1 the worker failed, 2 the input is at fault, 130 interrupted.")
    parser.add_argument("inputs", nargs="+", metavar="VIDEO AUDIO", help="one or more pairs")
    parser.add_argument("-o", "--output", type=Path, default=Path("out.mp4"),
                        help="MP4 to write, or the folder for it (default: out.mp4); several pairs need a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--preview", action="store_true", help="the first second only, to tune the options")
    parser.add_argument("--aspect-ratio", default="source", help="source or W:H")
    parser.add_argument("--resolution", default="source", help="source, 720p (short side) or WxH")
    parser.add_argument("--model-dir", help="folder of weights (default: MODEL_DIR or models/demo)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute (default: DEVICE or auto)")
    parser.add_argument("--json", action="store_true", help="print each job's body on standard output, one a line")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary; errors only")
    parser.add_argument("--version", action="version", version=f"musetalk-worker {__version__}")
    for name, field in Params.model_fields.items():
        flag, shown = "--" + name.replace("_", "-"), str(field.description).replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", default=None, help=shown)
            continue
        if field.default is not None:
            shown += f" (default: {field.default})"
        parser.add_argument(flag, help=shown, **_values(field.annotation))
    return parser


def _values(kind: Any) -> dict[str, Any]:
    """What an option of such a type takes."""
    choices = [k for k in (kind, *get_args(kind)) if get_origin(k) is Literal]
    numbers = [k for k in get_args(kind) if k not in (*choices, type(None))] if get_origin(kind) is Union else []
    if choices and not numbers:
        return {"choices": get_args(choices[0])}
    return {"type": _number_or_word}


def _number_or_word(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def films(inputs: list[str], output: Path, overwrite: bool) -> list[Film]:
    """The films a command line asks for; raises BadUse for outputs that cannot be."""
    if len(inputs) % 2:
        raise BadUse(f"VIDEO and AUDIO come in pairs, but {len(inputs)} inputs are given")
    pairs = list(zip(inputs[::2], inputs[1::2]))
    folder = output.is_dir() or str(output).endswith(os.sep) or (len(pairs) > 1 and not output.suffix)
    if len(pairs) > 1 and not folder:
        raise BadUse(f"-o {output}: several pairs need a folder: -o FOLDER{os.sep}")
    if not folder and output.suffix.lower() != ".mp4":
        raise BadUse(f"-o {output}: MP4 is written; name a file that ends in .mp4, or a folder as {output}{os.sep}")
    made = [Film(video, audio, _named(video, audio, output, pairs) if folder else output) for video, audio in pairs]
    for film in made:
        if film.output.exists() and not overwrite:
            raise BadUse(f"-o {film.output}: the file exists; give --overwrite to replace it")
        if sum(film.output == other.output for other in made) > 1:
            raise BadUse(f"{film.output} would be written twice: give two calls, or inputs with other names")
    return made


def _named(video: str, audio: str, folder: Path, pairs: list[tuple[str, str]]) -> Path:
    """The clip's name in the folder, with the speech's where the clip speaks several."""
    name, speech = (Path(unquote(urlsplit(text).path) if "://" in text else text).stem for text in (video, audio))
    alone = sum(video == other for other, _ in pairs) == 1
    return folder / f"{name if alone else f'{name}-{speech}'}.mp4"


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A folder on the output's disk for what is being made: whether it can be written is known before any work."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".musetalk-", dir=output.parent)
    except OSError as e:
        raise BadUse(f"-o {output}: cannot be written: {e.strerror}") from None
    with folder as name:
        yield Path(name)


def run(arguments: argparse.Namespace) -> int:
    """Make all films with one model; the exit code is the first failure's."""
    made = films(arguments.inputs, arguments.output, arguments.overwrite)
    said = {"MODEL_DIR": arguments.model_dir, "DEVICE": arguments.device}
    settings = Settings.for_shell(**{k: v for k, v in said.items() if v})
    with beside(made[0].output) as folder:
        from pipeline.run import Service  # torch takes its time: not before the command line is understood

        service = Service(settings.model_copy(update={
            "storage": "local", "local_storage_dir": folder, "local_input_root": Path("/")}))
        codes = [_film(service, film, arguments) for film in made]
    return next((code for code in codes if code), 0)


def _film(service: Service, film: Film, arguments: argparse.Namespace) -> int:
    params = {n: v for n in Params.model_fields if (v := getattr(arguments, n)) is not None}
    if isinstance(params.get("fps"), int):
        params["fps"] = float(params["fps"])
    job = {"musetalk_job_id": "cli", "video_url": _source(film.video), "audio_url": _source(film.audio),
           "aspect_ratio": arguments.aspect_ratio, "resolution": arguments.resolution, "params": params}
    progress: Callable[[str, float], None] | None = bar.draw if bar.shown() and not arguments.quiet else None
    control = Control(service.settings.job_deadline_sec, progress)
    body = service.run_job(job, control=control, preview=arguments.preview)
    if body["status"] == "success":
        Path(unquote(urlsplit(body["output_url"]).path)).replace(film.output)
        body["output_url"] = film.output.resolve().as_uri()
    elif progress:
        print(file=sys.stderr)  # the bar's line is not at its end
    return _tell(body, film, arguments)


def _tell(body: dict[str, Any], film: Film, arguments: argparse.Namespace) -> int:
    """Say how it went; exit code: 0 done, 1 the worker failed, 2 the input is at fault."""
    if arguments.json:
        print(json.dumps(body), flush=True)
    if body["status"] != "success":
        several = f"{film.output}: " if len(arguments.inputs) > 2 else ""
        print(f"error: {several}{body['error_message']}", file=sys.stderr)
        return 2 if body["error_type"] == "media_error" else 1
    if not arguments.json and not arguments.quiet:
        m = body["metrics"]
        print(f"{film.output}: {m['frames']} frames in {m['total_time']:.1f} s "
              f"({m['GENERATION_TIME_SEC']:.1f} s of them generation)", flush=True)
    return 0


def _source(text: str) -> str:
    """A URL as it is, a path made absolute."""
    return text if "://" in text else str(Path(text).absolute())


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the worker failed, 2 the input is at fault, 130 interrupted."""
    arguments = options().parse_args(argv)
    logs.setup("CRITICAL")
    try:
        return run(arguments)
    except (BadUse, BadSetting, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, BadUse) else 1
    except KeyboardInterrupt:
        print("\nerror: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
