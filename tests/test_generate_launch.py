"""`action=generate` and `action=evaluate` as a user types them."""

import pytest
from commands import QUICK, Command, rows

pytestmark = pytest.mark.dist


def test_stdout_holds_the_lines_and_the_run_stays_as_it_is(command: Command) -> None:
    assert command(*QUICK, "devices=2", "steps=4").returncode == 0
    run = command.run_folder()
    before = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (command.folder / "lines.txt").write_text("The\n\nof\n")
    asked = ["action=generate", f"resume={run}", "input=lines.txt", "generate.max_tokens=5"]
    done = command(*asked)
    assert done.returncode == 0, done.stderr
    assert [line[:3] for line in done.stdout.split("\n")][::2] == ["The", "of" + done.stdout.split("\n")[2][2:3]]
    assert len(done.stdout.split("\n")) == 4
    assert command(*asked).stdout == done.stdout
    assert command(*asked, "seed=1").stdout.split("\n")[0] != done.stdout.split("\n")[0]
    assert {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    evaluated = command("action=evaluate", f"resume={run}", "evaluate.split=valid")
    assert "valid split: loss" in evaluated.stdout, evaluated.stderr
    assert command(f"resume={run}", "steps=6").returncode == 0
    assert rows(run)[-1]["step"] == 6


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["action=generate"], "action=generate needs a trained run: resume=runs/NAME/TIME-ID"),
        (["action=evaluate", "evaluate.split=tset"], "evaluate.split=tset: no such choice. Did you mean 'test'?"),
        (["input=lines.txt"], "input=lines.txt goes with action=generate"),
        (["generate.beams=0", "generate.top_p=0"], "generate.beams=0 must be at least 1 and finite"),
        (["weights=worst"], "weights=worst: no such choice"),
        (["weights=best"], "weights=best goes with action=generate and evaluate"),
        (["action=evaluate", "evaluate.split=train"], "evaluate.split=train: no such choice"),
    ],
)
def test_what_cannot_be_asked_for(command: Command, words: list[str], answer: str) -> None:
    done = command(*QUICK, *words)
    assert done.returncode == 2
    assert answer in done.stderr
    assert not (command.folder / "runs").exists()
