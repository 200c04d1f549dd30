"""What the documentation says is there is there."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+\.md)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_name_on_the_reading_tour_exists() -> None:
    names = re.findall(r"`(pipetrain(?:\.\w+)+)`", (ROOT / "docs" / "reading.md").read_text())
    assert len(names) > 20
    for name in names:
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:cut]))
            except ModuleNotFoundError:
                continue
            break
        for part in parts[cut:]:
            found = getattr(found, part)


def test_the_drawn_schedules_are_the_current_ones() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    draw_schedules = importlib.import_module("draw_schedules")
    assert (ROOT / "docs" / "schedules.md").read_text() == draw_schedules.page(), "run scripts/draw_schedules.py"
    for name, schedule in {**draw_schedules.drawn(), **draw_schedules.drawn_stale()}.items():
        drawn = (ROOT / "docs" / "schedules" / f"{name}.svg").read_text()
        assert drawn == draw_schedules.picture(schedule), "run scripts/draw_schedules.py"


def test_the_drawn_model_is_the_current_one() -> None:
    draw_layers = importlib.import_module("draw_layers")
    assert (ROOT / "docs" / "seq2seq.svg").read_text() == draw_layers.seq2seq(), "run scripts/draw_layers.py"


def test_commands_of_the_readme_are_accepted() -> None:
    lines = re.findall(r"^    (pipetrain(?: [^#\n]*)?)", (ROOT / "README.md").read_text(), re.MULTILINE)
    commands = [line.strip() for line in lines if not re.search("resume=|my.yaml| -m ", line)]
    assert len(commands) >= 4
    for command in commands:
        words = command.replace("pipetrain", "", 1) + ("" if "--" in command else " --cfg job")
        done = subprocess.run(
            f"{sys.executable} -m pipetrain {words}", shell=True, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr)


def test_makefile_and_ci_use_the_same_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = re.findall(r"^make (.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)[0].split()
    named = re.findall(r"`?make ([a-z]+)", (ROOT / "README.md").read_text())
    assert set(used) | set(named) <= targets
