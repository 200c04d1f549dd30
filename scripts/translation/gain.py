"""What one model for many languages gains over one for each: a table and two figures, in the order of the data.

    .venv/bin/python scripts/translation/gain.py JOINT BILINGUAL [BILINGUAL ...]

Each is the folder of a run that `action=evaluate` has been through. JOINT has several languages, each BILINGUAL one
of them. Prints the table for docs/translation.md and writes docs/translation_gain.svg, as Figure 3 of Huang et al. 2019
in small, and docs/translation_curves.svg, the validation loss of each language over the pairs of it that were seen.
Needs matplotlib: pip install 'pipetrain[bench]'.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent.parent / "docs"
plt.rcParams["svg.hashsalt"] = "pipetrain"  # the same picture for the same numbers


def languages(run: Path) -> dict[str, dict[str, Any]]:
    """What `action=evaluate` said of each."""
    found = json.loads((run / "evaluation" / "test.json").read_text())["languages"]
    return {row["way"]: row for row in found}


def shown(score: dict[str, Any]) -> str:
    return f"{score['value']:.1f} ± {score['plus_minus']:.1f}"


def table(joint: dict[str, dict[str, Any]], alone: dict[str, dict[str, Any]]) -> str:
    """The languages with the most data first."""
    heads = ("languages", "pairs", "sentences", "NLL", "alone", "chrF", "alone", "source", "BLEU", "alone", "source")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for way, row in sorted(joint.items(), key=lambda item: -item[1]["pairs"]):
        single = alone[way]
        cells = [way, f"{row['pairs']:,}", f"{row['sentences']:,}", f"{row['nll']:.3f}", f"{single['nll']:.3f}"]
        for kind in ("chrf", "bleu"):
            cells += [shown(row[kind]), shown(single[kind]), f"{row[f'copied_{kind}']['value']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    signatures = dict.fromkeys(row[kind]["signature"] for row in joint.values() for kind in ("chrf", "bleu"))
    return "\n".join([*lines, "", *(f"`{signature}`" for signature in signatures)])


def draw_gain(joint: dict[str, dict[str, Any]], alone: dict[str, dict[str, Any]]) -> None:
    ways = sorted(joint, key=lambda way: -joint[way]["pairs"])
    figure, axes = plt.subplots(figsize=(6, 3.2), constrained_layout=True)
    axes.axhline(0, color="#888", linewidth=0.8)
    for kind, mark in (("chrf", "o"), ("bleu", "s")):
        gains = [joint[way][kind]["value"] - alone[way][kind]["value"] for way in ways]
        spread = [(joint[way][kind]["plus_minus"] ** 2 + alone[way][kind]["plus_minus"] ** 2) ** 0.5 for way in ways]
        axes.errorbar(
            range(len(ways)), gains, spread, marker=mark, capsize=3, label={"chrf": "chrF", "bleu": "BLEU"}[kind]
        )
    axes.set_xticks(range(len(ways)), [f"{way}\n{joint[way]['pairs']:,} pairs" for way in ways])
    axes.set_ylabel("joint model minus bilingual one")
    axes.legend()
    figure.savefig(DOCS / "translation_gain.svg", metadata={"Date": None})


def draw_curves(joint: Path, alone: list[Path]) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    colours: dict[str, str] = {}
    for run, style in ((joint, "-"), *((run, "--") for run in alone)):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "val/nll" in row]
        for way in sorted(key.removeprefix("val_nll/") for key in rows[-1] if key.startswith("val_nll/")):
            label = way if style == "-" else f"{way}, alone"
            seen = [row[f"pairs_seen/{way}"] for row in rows]
            losses = [row[f"val_nll/{way}"] for row in rows]
            (line,) = axes.plot(seen, losses, style, color=colours.get(way), label=label, linewidth=1.2)
            colours[way] = line.get_color()
    axes.set_xlabel("pairs of the language seen")
    axes.set_ylabel("validation: -log p of a token")
    axes.set_xscale("log")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(DOCS / "translation_curves.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("joint", type=Path)
    parser.add_argument("bilingual", type=Path, nargs="+")
    options = parser.parse_args()
    joint = languages(options.joint)
    alone = {way: row for run in options.bilingual for way, row in languages(run).items()}
    print(table(joint, alone))
    draw_gain(joint, alone)
    draw_curves(options.joint, options.bilingual)


if __name__ == "__main__":
    main()
