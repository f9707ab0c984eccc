"""The worker for people at a shell: python -m pipeline VIDEO AUDIO -o out.mp4."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from urllib.parse import unquote, urlsplit

from pipeline import logs
from pipeline.run import Service
from pipeline.schema import Params
from pipeline.settings import BadSetting, Settings

BAR = 30  # characters


def options() -> argparse.ArgumentParser:
    """The command line: every key of `params` is an option."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline", description="Make the face in VIDEO speak AUDIO.",
        epilog="VIDEO may be a still image, AUDIO a video's sound track; both may be URLs.")
    parser.add_argument("video", metavar="VIDEO")
    parser.add_argument("audio", metavar="AUDIO")
    parser.add_argument("-o", "--output", type=Path, default=Path("out.mp4"), help="MP4 to write (default: out.mp4)")
    parser.add_argument("--preview", action="store_true", help="the first second only, to tune the options")
    parser.add_argument("--aspect-ratio", default="source", help="source or W:H")
    parser.add_argument("--resolution", default="source", help="source, 720p (short side) or WxH")
    parser.add_argument("--model-dir", type=Path, help="folder of weights (default: MODEL_DIR or models/demo)")
    for name, field in Params.model_fields.items():
        flag, shown = "--" + name.replace("_", "-"), f"{field.description} (default: {field.default})"
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", default=None, help=field.description)
        elif get_origin(field.annotation) is Literal:
            parser.add_argument(flag, choices=get_args(field.annotation), help=shown)
        else:
            parser.add_argument(flag, type=_number_or_word, help=shown)
    return parser


def _number_or_word(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def bar(stage: str, share: float) -> None:
    """Draw the progress bar."""
    full = int(share * BAR)
    print(f"\r{stage:<10} [{'#' * full}{'.' * (BAR - full)}] {share:4.0%}", end="", file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the job with the result in a temporary folder, then move it to its place."""
    params = {n: v for n in Params.model_fields if (v := getattr(arguments, n)) is not None}
    if isinstance(params.get("fps"), int):
        params["fps"] = float(params["fps"])
    with tempfile.TemporaryDirectory(prefix="musetalk-cli-") as folder:
        changes: dict[str, Any] = {"storage": "local", "local_storage_dir": Path(folder), "local_input_root": Path("/")}
        if arguments.model_dir:
            changes["model_dir"] = arguments.model_dir
        service = Service(Settings.from_env().model_copy(update=changes))
        job = {"musetalk_job_id": "cli", "video_url": _source(arguments.video), "audio_url": _source(arguments.audio),
               "aspect_ratio": arguments.aspect_ratio, "resolution": arguments.resolution, "params": params}
        body = service.run_job(job, progress=bar, preview=arguments.preview)
        if body["status"] == "success":
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(unquote(urlsplit(body["output_url"]).path), arguments.output)
    return body


def _source(text: str) -> str:
    """A URL as it is, a path made absolute."""
    return text if "://" in text else str(Path(text).absolute())


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the worker failed, 2 the input is at fault."""
    arguments = options().parse_args(argv)
    logs.setup("ERROR")
    try:
        body = run(arguments)
    except (BadSetting, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(file=sys.stderr)
    if body["status"] == "success":
        m = body["metrics"]
        print(f"{arguments.output}: {m['frames']} frames in {m['total_time']:.1f} s "
              f"({m['GENERATION_TIME_SEC']:.1f} s of them generation)")
        return 0
    print(f"error: {body['error_message']}", file=sys.stderr)
    return 2 if body["error_type"] == "media_error" else 1


if __name__ == "__main__":
    sys.exit(main())
