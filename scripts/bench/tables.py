"""The results as tables in Markdown, and a figure."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import stale
from emulated import NAMES, WANTED


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def show_emulated(found: dict[str, Any]) -> str:
    rows = []
    for r in found.values():
        share = {name: f"{value:.3f}" for name, value in r["share_of_ideal"].items()}
        simulated = r["simulated_s"] / r["seconds"]["pipetrain"]
        times = f"{r['times_torch']:.3f}" if "times_torch" in r else "refuses"
        wanted = f"{WANTED[r['K']]:.2f}" if r["schedule"] == "gpipe" else ""
        rows.append(
            [
                r["schedule"],
                r["K"],
                r["M"],
                f"{r['ideal_s']:.3f}",
                f"{r['seconds']['pipetrain']:.3f}",
                share["pipetrain"],
                wanted,
                f"{simulated:.3f}",
                share.get("torch", ""),
                share.get("torchgpipe", ""),
                times,
            ]
        )
    ratios = [r["times_torch"] for r in found.values() if "times_torch" in r]
    header = ["schedule", "K", "M", "ideal s", "pipetrain s", "share of ideal", "wanted", "simulated / measured"]
    header += ["torch: share", "torchgpipe: share", "speed / torch"]
    average = f"\nSpeed over torch, mean of {len(ratios)}: {sum(ratios) / len(ratios):.3f}, least {min(ratios):.3f}\n"
    return table(header, rows) + (average if ratios else "")


def show_zero_bubble(found: dict[str, Any]) -> str:
    rows = [[k, f"{r['measured']:.3f}", f"{r['simulated']:.3f}"] for k, r in found.items()]
    return table(["zb_h1 / 1f1b, F = I = W = 50 ms", "measured", "simulated"], rows)


def show_real(found: dict[str, Any]) -> str:
    rows = []
    for model, r in found.items():
        rows.append([model, "one stage / plain loop", f"{r['one stage / plain']:.3f}"])
        rows.append([model, "torchgpipe on two / plain loop", f"{r['torchgpipe on 2 / plain']:.3f}"])
        for name, ratios in r.items():
            if isinstance(ratios, dict):
                rows += [[model, f"{name}: {key}", f"{value:.3f}"] for key, value in ratios.items()]
    return table(["model", "speed, 32 micro-batches", "ratio"], rows)


def show_memory(found: dict[str, Any]) -> str:
    def mib(num_bytes: float) -> str:
        return f"{num_bytes / 2**20:.1f}"

    rows = [
        [model, each, ", ".join(map(mib, stages)), mib(sum(stages))]
        for model in ("transformer", "amoebanet")
        for each, stages in sorted(found[model].items(), key=lambda item: item[0].split()[1:])
    ]
    text = table(["model", "engine, schedule, recompute", "MiB in each process", "together"], rows)
    ks = sorted({key.split("_")[0] for key in found["sweep"]})
    ms = sorted({int(key.split("_M")[1]) for key in found["sweep"]})
    sweep = [[k, *(mib(max(found["sweep"][f"{k}_M{m}"])) for m in ms)] for k in ks]
    return text + "\n" + table(["gpipe, always: largest stage, MiB", *(f"M={m}" for m in ms)], sweep)


def show_overhead(found: dict[str, Any]) -> str:
    rows = [
        [name, f"{value:.2%}" if "structures" in name else f"{value:.0f}"]
        for name, value in found.items()
        if name != "wanted_us"
    ]
    return table([f"cost of the engine (wanted: under {found['wanted_us']} us, 2 %)", ""], rows)


def show_balance(found: dict[str, Any]) -> str:
    rows = [
        ["torchgpipe's slowest stage / the best one's, mean", f"{found['mean']:.3f}"],
        ["the same, worst list", f"{found['worst']:.2f}"],
        ["lists on which it is as good", f"{found['optimal']:.1%}"],
        *([f"search: {what}", f"{seconds:.2f} s"] for what, seconds in found["search_s"].items()),
    ]
    return table(["balance", "value"], rows)


def show_gain(found: dict[str, Any]) -> str:
    rows = []
    for model, r in found.items():
        cuts = [f"[{','.join(map(str, r['balances'][name]))}]" for name in ("even", "auto")]
        right = [f"{r['predicted / measured'][name]:.3f}" for name in ("even", "auto")]
        rows.append([model, *cuts, f"{r['predicted']:.3f}", f"{r['measured']:.3f}", ", ".join(right)])
    header = ["two cores", "even", "auto", "even / auto, predicted", "measured", "steps predicted / measured"]
    return table(header, rows)


def show_planned(found: dict[str, Any]) -> str:
    def shown(plan: dict[str, Any]) -> str:
        cut = ",".join(map(str, plan["balance"]))
        return f"`{plan['schedule']}` M={plan['num_microbatches']} {plan['recompute']} [{cut}]"

    rows, over, off = [], [], []
    for r in found.values():
        chosen, every = r["chosen"], r["plans"]
        best = min(every, key=lambda plan: plan["measured_s"])
        off += [plan["predicted_s"] / plan["measured_s"] for plan in every]
        over.append(chosen["measured_s"] / best["measured_s"])
        right = f"{chosen['predicted_s'] / chosen['measured_s']:.3f}"
        worst = max(plan["measured_s"] for plan in every) / best["measured_s"]
        rows.append(
            [r["model"], r["K"], len(every), shown(chosen), right, shown(best), f"{over[-1]:.3f}", f"{worst:.2f}"]
        )
    header = ["model", "K", "plans", "the planner's", "predicted / measured", "fastest", "planner's / fastest"]
    text = table([*header, "slowest / fastest"], rows)
    within = sum(abs(ratio - 1) <= 0.05 for ratio in off) / len(off)
    return (
        f"{text}\nThe planner's / the fastest, worst: {max(over):.3f}. Predicted / measured of all {len(off)} plans: "
        f"{min(off):.3f} to {max(off):.3f}, median {statistics.median(off):.3f}, within 5 % for {within:.0%}\n"
    )


def show_stale(found: dict[str, Any]) -> str:
    return table(stale.HEADER, stale.rows(found))


SHOWN: dict[str, Callable[[dict[str, Any]], str]] = {
    "balance": show_balance,
    "planned": show_planned,
    "gain": show_gain,
    "emulated": show_emulated,
    "zero_bubble": show_zero_bubble,
    "real": show_real,
    "memory": show_memory,
    "overhead": show_overhead,
    "stale": show_stale,
}


def draw_emulated(found: dict[str, Any], path: Path) -> None:
    """Share of the ideal over the number of devices, M = 32."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bench"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(NAMES), figsize=(16, 3.2), sharey=True)
    colours = {"pipetrain": "#2f6fb3", "torch": "#d98032", "torchgpipe": "#7a7a7a"}
    for axis, name in zip(axes, NAMES, strict=True):
        cells = [r for r in found.values() if r["schedule"] == name and r["M"] == 32]
        for contestant, colour in colours.items():
            points = [(r["K"], r["share_of_ideal"][contestant]) for r in cells if contestant in r["share_of_ideal"]]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=contestant, color=colour)
        axis.set_xscale("log", base=2)
        axis.set_title(name)
        axis.set_xlabel("devices")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of the ideal")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
