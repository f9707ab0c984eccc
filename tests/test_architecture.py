"""Who may import whom, read from the source with ast: an arrow that the architecture does not have fails here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [*sorted((ROOT / "musetalk").rglob("*.py")), *sorted((ROOT / "pipeline").rglob("*.py")), ROOT / "handler.py"]

# who may import whom: a room, then the rooms it may use; a package is one room
MUSETALK = {
    "errors": "", "options": "", "box": "", "nets": "errors", "interruption": "errors",
    "order": "options", "imaging": "box", "place": "box", "avatar": "box place", "parts": "", "colour": "imaging parts",
    "checkpoints": "errors nets",
    "audio": "errors nets", "faces": "box imaging nets parts place", "track": "box faces nets place", "generate": "nets",
    "blend": "box imaging nets options place", "finish": "blend box imaging place",
    "tuning": "generate nets", "layout": "checkpoints nets",
    "lipsync": "audio avatar blend box checkpoints errors faces finish generate interruption layout nets options order parts "
               "place track tuning",
}
PIPELINE = {
    "errors": "", "settings": "", "redact": "", "metrics": "errors",
    "control": "errors", "logs": "redact", "bar": "", "schema": "errors", "health": "settings", "runner": "control",
    "media": "errors redact settings", "leave": "control",
    "download": "control errors leave redact settings", "validate": "control download errors media settings",
    "credentials": "control errors leave settings",
    "provenance": "control credentials settings",
    "b2line": "leave settings",
    "storage": "b2line control errors leave redact settings",
    "engine": "errors media metrics settings", "stages": "errors media runner",
    "stream": "control engine errors leave media provenance runner schema stages validate",
    "preview": "engine errors media schema stream validate",
    "run": "control download engine errors metrics preview provenance redact schema settings storage stream validate",
    "server": "control errors logs metrics redact run schema settings", "__main__": "bar control logs run schema settings",
    "weights": "",
    "page": "control errors logs preview run schema settings", "handler": "bar control logs run settings",
}
USES_MUSETALK = {"engine", "stages", "stream", "preview", "weights"}  # schema: its options alone
OUTSIDE = {"subprocess": "media", "requests": "download storage b2line leave weights", "runpod": "handler",
           "b2sdk": "storage b2line", "fastapi": "server", "uvicorn": "server",
           "c2pa": "credentials provenance", "gradio": "page"}


def room_of(path: Path) -> str:
    inside = path.relative_to(ROOT).with_suffix("").parts
    return inside[1] if len(inside) > 1 else inside[0]


def imports(path: Path) -> set[str]:
    """Full names of all imported modules; of `from a import b`, both `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


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


def training() -> dict[str, str]:
    """What the modules of training use of each other; they need no table."""
    files = [p for p in (ROOT / "training").glob("*.py") if not p.stem.startswith("__")]
    names = {p.stem for p in files}
    return {p.stem: " ".join({i.split(".")[1] for i in imports(p) if i.startswith("training.")} & names) for p in files}


def test_no_room_walks_back() -> None:
    """The tables have no circle: each room can be placed above all that it uses."""
    for table in (MUSETALK, PIPELINE, training()):
        placed: set[str] = set()
        while len(placed) < len(table):
            new = {room for room, uses in table.items() if room not in placed and set(uses.split()) <= placed}
            assert new, f"a circle among {table.keys() - placed}"
            placed |= new


@pytest.mark.parametrize("path", sorted((ROOT / "musetalk" / "nets").glob("*.py")), ids=lambda p: p.stem)
def test_networks_know_only_layers(path: Path) -> None:
    inside = {i.split(".")[2] for i in imports(path) if i.startswith("musetalk.nets.")}
    assert inside <= {"layers"}
    others = {i for i in imports(path) if i.startswith("musetalk.") and not i.startswith("musetalk.nets")}
    assert others <= {"musetalk.errors", "musetalk.errors.BadCheckpoint"}


@pytest.mark.parametrize("module", ["musetalk.options", "pipeline.schema", "pipeline.settings", "pipeline.redact"])
def test_definitions_are_light(module: str) -> None:
    """Help, settings and schemas are shown without waiting for torch."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_settings_reads_the_environment(path: Path) -> None:
    if path.name == "settings.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in ("getenv", "environb"), node.lineno
            if node.attr == "environ":
                assert path.name in ("handler.py", "page.py"), node.lineno  # they set what their SDK reads when imported


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name
