"""Who may import whom, read from the source with ast: an arrow that the architecture does not have fails here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = {"download", "validate", "stream", "storage"}
STEPS = {"audio", "faces", "generate", "blend"}
FILES = [*sorted((ROOT / "musetalk").rglob("*.py")), *sorted((ROOT / "pipeline").glob("*.py")), ROOT / "handler.py"]


def imports(path: Path) -> set[str]:
    """Full names of all imported modules of this project and top-level names of others."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def uses(path: Path, name: str) -> bool:
    return any(i == name or i.startswith(name + ".") for i in imports(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    inside = path.relative_to(ROOT).parts
    name = path.stem
    if inside[0] == "musetalk":
        assert not uses(path, "pipeline")
        assert not uses(path, "runpod")
        for outside in ("subprocess", "requests", "urllib", "http", "socket"):
            assert not uses(path, outside), outside
    if inside[:2] == ("musetalk", "nets"):
        siblings = {p.stem for p in (ROOT / "musetalk" / "nets").glob("*.py")} - {"layers", "__init__"}
        assert not [s for s in siblings if uses(path, f"musetalk.nets.{s}")]
    if inside[0] == "musetalk" and name in STEPS:
        assert not [s for s in STEPS - {name} if uses(path, f"musetalk.{s}")]
    if inside[0] == "pipeline":
        light = name == "schema" and {i for i in imports(path) if i.startswith("musetalk")} == {
            "musetalk.options", "musetalk.options.Options"}
        owners = ("weights", "engine", "stream", "stages")
        assert light or name in owners or not uses(path, "musetalk"), "who may import musetalk"
        assert name in ("server", "__main__") or not uses(path, "pipeline.run"), "nobody walks back to run"
        assert name == "run" or name not in STAGES or not [
            s for s in STAGES - {name} if uses(path, f"pipeline.{s}") and (name, s) not in ALLOWED]
        if name == "runner":
            assert {i for i in imports(path) if i.startswith("pipeline")} == {"pipeline.control", "pipeline.control.Control"}
        assert name == "media" or not uses(path, "subprocess"), "only media starts children"


ALLOWED = {("validate", "download"), ("stream", "validate")}  # their result types


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
                assert path.name == "handler.py", node.lineno  # sets the SDK's log level before importing it


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name
