"""Who may import whom, read from the source with ast: an arrow that the architecture does not have fails here."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [*sorted((ROOT / "musetalk").rglob("*.py")), *sorted((ROOT / "pipeline").rglob("*.py")), ROOT / "handler.py"]

# who may import whom: a room (a folder, or a file beside the folders), then the rooms it may use
MUSETALK = {
    "errors": "", "options": "errors", "order": "options", "geometry": "pixels", "nets": "errors", "pixels": "",
    "tensor_pickle": "", "checkpoints": "errors nets tensor_pickle",
    "sound": "errors nets", "avatar": "errors geometry", "face": "errors geometry nets pixels",
    "draw": "checkpoints errors nets", "show": "geometry nets options pixels",
    "steps": "avatar checkpoints draw errors face geometry options pixels show sound",
    "live": "avatar checkpoints draw errors options order pixels sound steps",
    "lipsync": "avatar checkpoints draw errors options order sound steps",
}
PIPELINE = {
    "errors": "", "settings": "", "job": "errors settings", "schema": "errors", "weights": "",
    "ffmpeg": "errors job settings", "media": "errors ffmpeg job settings", "transfer": "errors ffmpeg job settings",
    "mark": "errors ffmpeg job settings transfer",
    "provenance": "mark",
    "film": "errors ffmpeg job mark media schema settings transfer",
    "run": "errors film job mark media schema settings transfer",
    "http": "errors job run settings transfer", "server": "errors http job run schema settings",
    "queue": "errors http job run settings",
    "shell": "errors job run schema settings", "__main__": "job shell",
    "page": "errors film job run schema settings", "handler": "job run settings",
    "live": "errors job settings",
}
USES_MUSETALK = {"film", "live", "weights"}  # schema: its options alone
OUTSIDE = {"subprocess": "ffmpeg media transfer", "requests": "transfer weights", "runpod": "handler", "b2sdk": "transfer",
           "boto3": "transfer", "botocore": "transfer", "fastapi": "http live page server", "uvicorn": "http live server",
           "c2pa": "mark provenance", "nicegui": "page", "PIL": "page",
           "aiortc": "live", "av": "live", "livekit": "live", "procrastinate": "queue", "psycopg": "queue"}


def room_of(path: Path) -> str:
    inside = path.relative_to(ROOT).with_suffix("").parts
    return inside[1] if len(inside) > 1 else inside[0]


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports(path: Path) -> frozenset[str]:
    """Full names of all imported modules; of `from a import b`, both `a` and `a.b`."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def rooms(path: Path, package: str) -> set[str]:
    """The rooms of a package that a file imports from."""
    known = MUSETALK if package == "musetalk" else PIPELINE
    return {name.split(".")[1] for name in imports(path) if name.startswith(package + ".")} & known.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    room, package = room_of(path), path.relative_to(ROOT).parts[0]
    if room == "__init__":
        return
    table = MUSETALK if package == "musetalk" else PIPELINE
    assert room in table, "a new room needs its row in the table"
    own = package if package == "musetalk" else "pipeline"
    assert rooms(path, own) <= {*table[room].split(), room}
    if package == "musetalk":
        assert not rooms(path, "pipeline")
    elif room not in USES_MUSETALK:
        assert not any(i.startswith("musetalk") for i in imports(path) - {"musetalk.options", "musetalk.options.Options"})
    for name, users in OUTSIDE.items():
        used = any(i == name or i.startswith(name + ".") for i in imports(path))
        assert not used or (package != "musetalk" and room in users.split()), name


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_file_walks_back() -> None:
    """No circle among files: each can be placed above all that it uses."""
    files = [p for folder in ("musetalk", "pipeline", "training") for p in (ROOT / folder).rglob("*.py")]
    uses = {module_of(p): imports(p) for p in files if p.name != "__main__.py"}
    uses = {m: {i for i in found if i in uses and i != m} for m, found in uses.items()}
    placed: set[str] = set()
    while len(placed) < len(uses):
        new = {m for m, used in uses.items() if m not in placed and used <= placed | {m.rpartition(".")[0]}}
        assert new, f"a circle among {sorted(uses.keys() - placed)}"
        placed |= new


@pytest.mark.parametrize("path", sorted((ROOT / "musetalk" / "nets").glob("*.py")), ids=lambda p: p.stem)
def test_networks_know_only_layers(path: Path) -> None:
    inside = {i.split(".")[2] for i in imports(path) if i.startswith("musetalk.nets.")}
    assert inside <= ({"layers", "tiny"} if path.stem == "fast" else {"layers"})
    others = {i for i in imports(path) if i.startswith("musetalk.") and not i.startswith("musetalk.nets")}
    assert others <= {"musetalk.errors", "musetalk.errors.BadCheckpoint"}


@pytest.mark.parametrize("module", ["musetalk.options", "pipeline.schema", "pipeline.settings", "pipeline.job.redact"])
def test_definitions_are_light(module: str) -> None:
    """Help, settings and schemas are shown without waiting for torch."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_settings_reads_the_environment(path: Path) -> None:
    if path.name == "settings.py":
        return
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in ("getenv", "environb"), node.lineno
            if node.attr == "environ":
                assert path.name == "handler.py", node.lineno  # it sets what its SDK reads when imported


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path: Path) -> None:
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name
