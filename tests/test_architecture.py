"""Imports point one way, and the layers of the design stay layers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pipetrain"

# Each unit may import the ones listed, and itself. `schedule` and `sim` and what they stand on are pure Python.
BASE = {"errors", "costs", "paths", "seeds", "suggest"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "costs": set(),
    "paths": set(),
    "seeds": set(),
    "segment_memory": set(),
    "suggest": set(),
    "devices": {"errors"},
    "schedule": {"errors"},
    "garbage": set(),
    "sim": {"schedule", "costs", "errors", "garbage"},
    "groups": set(),
    "config": {"groups", "schedule"},
    "derived": {"config", "schedule"},
    "rules": {"config", "derived", "errors", "devices", "suggest", "schedule"},
    "vision": set(),
    "models": {"errors", "seeds", "segment_memory", "suggest", "vision"},
    "data": {"errors", "processes", "seeds", "suggest", "vision"},
    "partition": {"models", "schedule", "costs", "errors", "seeds", "suggest"},
    "engine": {"schedule", "errors", "garbage", "seeds", "segment_memory"},
    "training": BASE | {"config", "derived", "schedule", "sim", "models", "data", "partition", "engine"},
    "pipeline": {"engine", "errors", "models", "partition", "schedule", "sim", "suggest", "training"},
    "profile": {"costs", "engine", "models", "partition", "schedule", "seeds"},
    "environment": {"paths"},
    "inference": BASE
    | {"config", "data", "devices", "engine", "models", "rules", "schedule", "segment_memory", "torchrun", "training"},
    "planning": BASE
    | {"config", "derived", "engine", "models", "partition", "profile", "schedule", "sim", "training", "worker"},
    "processes": set(),
    "torchrun": {"errors"},
    "worker": {"derived", "processes", "training", "engine", "errors", "paths"},
    "check": BASE
    | {"config", "derived", "launch", "models", "partition", "planning", "schedule", "segment_memory", "torchrun"}
    | {"training", "worker"},
    "preview": {
        "config",
        "derived",
        "devices",
        "errors",
        "launch",
        "models",
        "paths",
        "planning",
        "schedule",
        "torchrun",
    }
    | {"training"},
    "launch": BASE
    | {
        "config",
        "data",
        "derived",
        "devices",
        "environment",
        "models",
        "planning",
        "processes",
        "rules",
        "torchrun",
        "training",
    }
    | {"worker"},
}
# The front end: may use anything below it, launch only inside the function that starts a run.
FRONT = {"cli", "__main__", "argv", "mistakes", "help", "sweep", "footprint"}
NO_TORCH = {"schedule", "sim", "config", "groups", "derived", "rules", "devices", *BASE, *FRONT} - {"seeds"}
SEES_HYDRA = {"cli"}
# What a guarantee is checked against must not be the engine itself: by no road through training either.
OF_THE_REFERENCE = {
    "segment_memory",
    "config",
    "derived",
    "models.recipe",
    "partition.split",
    "seeds",
    "training.optim",
    "training.record",
}


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "pipetrain" else [node.module]
            )
            names += full
    return names


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    unit = unit_of(path)
    used = {name.split(".")[1] for name in imported_modules(path) if name.startswith("pipetrain.")}
    if unit not in FRONT:
        assert unit in MAY_IMPORT, f"{unit} is new: say in this test what it may import"
        assert used <= MAY_IMPORT[unit] | {unit, "__version__"}, (
            f"{path.name} imports {used - MAY_IMPORT[unit] - {unit}}"
        )
    third_party = {name.split(".")[0] for name in imported_modules(path)}
    if unit in NO_TORCH:
        assert "torch" not in third_party
    if unit not in SEES_HYDRA:
        assert not third_party & {"hydra", "omegaconf"}


def test_imports_inside_functions_are_in_the_front_end_only() -> None:
    """They hide cycles. The command line needs one, so that --help does not load torch."""
    for path in FILES:
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        inner = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.ImportFrom)]
        own = [n for n in inner if (n.module or "").startswith("pipetrain")]
        assert not own or unit_of(path) in FRONT, f"{path}: line {own[0].lineno}"


def test_the_reference_knows_nothing_of_the_engine() -> None:
    used = [name for name in imported_modules(PACKAGE / "check" / "reference.py") if name.startswith("pipetrain")]
    assert {name.removeprefix("pipetrain.") for name in used} <= OF_THE_REFERENCE
    code = "import sys, pipetrain.check.reference; sys.exit(any('pipetrain.engine' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_loads_no_torch() -> None:
    code = "import sys, pipetrain.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_and_functions_stay_small() -> None:
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path}: is there a second idea in it?"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
