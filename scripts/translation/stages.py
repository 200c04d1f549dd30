"""Tokens a second of the LibreOffice recipe on one stage and on two, a thread each, with the real command.

    .venv/bin/python scripts/translation/stages.py FOLDER     what scripts/fetch_data.py brought

In turns; the ratio is the median of ROUNDS. Writes bench/translation_stages.json. Run it on an idle machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS, STEPS, WARM_UP = 5, 40, 8
OUTPUT = Path("bench")


def speed(folder: Path, devices: int) -> float:
    """Of the same mini-batches, whatever the number of devices."""
    with tempfile.TemporaryDirectory() as run:
        words = ["experiment=libreoffice", f"data.path={folder.absolute()}", f"devices={devices}", f"steps={STEPS}"]
        words += ["eval.every=0", "checkpoint.every=0", "log_every=1", f"hydra.run.dir={run}"]
        words += ["balance=even", "schedule=gpipe"] if devices == 1 else []
        subprocess.run([sys.executable, "-m", "pipetrain", *words], check=True, capture_output=True)
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    seconds = sum(line["speed/step_s"] for line in lines)
    return sum(line["speed/tokens_per_s"] * line["speed/step_s"] for line in lines) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for number in range(ROUNDS):
        for devices in (1, 2) if number % 2 == 0 else (2, 1):
            speeds[devices].append(speed(folder, devices))
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    result = {"one stage": speeds[1], "two stages": speeds[2], "ratio": statistics.median(ratios), "wanted": 1.5}
    one, two = (statistics.median(its) for its in speeds.values())
    print(f"one stage {one:,.0f} tokens/s, two {two:,.0f}; ratio {result['ratio']:.2f}")
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "translation_stages.json").write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
