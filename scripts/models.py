"""Trains every classification model of torchvision for one step, cut into 2 and 4 stages, against the module itself.

    .venv/bin/python scripts/models.py                   all models, resumable: a result file each, then docs/models.md
    .venv/bin/python scripts/models.py resnet50 vgg11    some of them
    .venv/bin/python scripts/models.py --table           only the page

A model is one that knows nothing of pipelines, with random weights, and a mini-batch of 4 images in 2 micro-batches.
float64: loss and gradients of the pipeline against the plain module called micro-batch by micro-batch (`plain.py`).
float32: the same bits on 1, 2 and 4 stages.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from plain import train_step
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipetrain.engine.local import LocalTransport, run_ranks
from pipetrain.engine.runtime import Runtime
from pipetrain.engine.stage import Stage
from pipetrain.engine.tied import Tie
from pipetrain.models import BATCH, Recipe
from pipetrain.models.anything import anything
from pipetrain.models.losses import cross_entropy_sum
from pipetrain.partition.split import build_layer, dataflow_of, stages_of_ties, take_stage
from pipetrain.schedule import build
from pipetrain.sim.balance import even
from pipetrain.vision import import_torchvision

CPU = torch.device("cpu")
SEED, MICRO_BATCHES, BATCH_SIZE, CLASSES = 0, 2, 4, 1000
STAGES = (2, 4)
LEAST_SHARE = 0.10
MEMORY_BYTES = 20e9  # weights and gradients in float64, twice
RESULTS, PAGE = Path("bench/models"), Path("docs/models.md")
WANTED_ERROR = 1e-10

# The least side of an image that a family takes, and arguments where its size is fixed when it is built.
SIDES = {"alexnet": 63, "googlenet": 64, "inception": 299, "maxvit": 224, "swin": 64, "vit_h_14": 28}
OWN_SIZE = {"vit": "image_size"}


def side_of(name: str) -> int:
    return next((side for family, side in SIDES.items() if name.startswith(family)), 32)


def arguments_of(name: str) -> dict[str, Any]:
    key = next((argument for family, argument in OWN_SIZE.items() if name.startswith(family)), None)
    return {key: side_of(name)} if key else {}


def data(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = side_of(name)
    images = torch.randn(BATCH_SIZE, 3, side, side, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(0, CLASSES, (BATCH_SIZE,), generator=generator)


def recipe_of(name: str) -> Recipe:
    return anything(factory=name, arguments=arguments_of(name), loss="cross_entropy", seed=SEED)


def plain(name: str) -> tuple[float, dict[str, Tensor]]:
    """Loss sum and gradients of the module itself in float64."""
    import_torchvision()
    import torchvision

    torch.manual_seed(SEED)
    module: nn.Module = torchvision.models.get_model(name, weights=None, **arguments_of(name)).double()
    images, classes = data(name, torch.float64)
    pieces = images.tensor_split(MICRO_BATCHES), classes.tensor_split(MICRO_BATCHES)
    return train_step(module, lambda output, target: cross_entropy_sum(output, (target,)), *pieces, seed=SEED)


def pipelined(name: str, balance: Sequence[int], dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """The same through the engine, all stages in this process."""
    recipe = recipe_of(name)
    images, classes = data(name, dtype)
    dataflow = dataflow_of(recipe, balance)
    schedule = build("gpipe", len(balance), MICRO_BATCHES, recompute="always", skips=dataflow.skips())
    ties = [Tie(tuple(uses)) for uses in stages_of_ties(recipe, balance)]

    def rank_main(transport: LocalTransport) -> tuple[float, dict[str, Tensor]]:
        layers = take_stage(recipe, balance, transport.rank, seed=SEED, device=CPU)
        typed = [(layer.name, layer.prefix, layer.module.to(dtype)) for layer in layers]
        is_last = transport.rank == len(balance) - 1
        loss_sum = recipe.loss_sum if is_last else None
        stage = Stage(transport.rank, typed, dataflow, device=CPU, seed=SEED, loss_sum=loss_sum)
        runtime = Runtime([stage], len(balance), transport, CPU, ties=ties)
        program = runtime.prepare(schedule)
        report = runtime.train_step(program, 0, (images,), (classes,), total=BATCH_SIZE, update=lambda _: None)
        return report.loss_sum, {n: p.grad for n, p in runtime.own_parameters.items() if p.grad is not None}

    ranks = run_ranks(len(balance), rank_main)
    return ranks[0][0], {name: gradient for _, part in ranks for name, gradient in part.items()}


# ---- balance ---------------------------------------------------------------------------------------------------------


def costs(name: str) -> tuple[list[int], list[int]]:
    """Parameters and forward FLOPs of each layer."""
    recipe = recipe_of(name)
    layers = [build_layer(layer, SEED).eval() for layer in recipe.layers]
    images, _ = data(name, torch.float32)
    outputs: dict[str, Any] = {}
    flops = []
    for place, (layer, module) in enumerate(zip(recipe.layers, layers, strict=True)):
        arguments = [
            images if value.layer == BATCH else _element(outputs[value.layer], value.element)
            for value in recipe.taken_by(place)
        ]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            outputs[layer.name] = module(*arguments)
        flops.append(counter.get_total_flops())
    seen: set[int] = set()
    parameters = []
    for module in layers:
        own = [p for p in module.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        parameters.append(sum(p.numel() for p in own))
    return parameters, flops


def _element(output: Any, element: int | str | None) -> Any:
    return output if element is None else output[element]


def share(parameters: Sequence[int], flops: Sequence[int], start: int, end: int) -> float:
    """What layers [start, end) hold of the model: of its parameters or of its FLOPs, whichever is more."""
    return max(sum(parameters[start:end]) / sum(parameters), sum(flops[start:end]) / sum(flops))


def best_balance(parameters: Sequence[int], flops: Sequence[int], stages: int) -> tuple[tuple[int, ...], float]:
    """The cut whose smallest stage is largest, and that stage's share."""
    best: tuple[tuple[int, ...], float] = (even(len(parameters), stages), 0.0)
    for borders in itertools.combinations(range(1, len(parameters)), stages - 1):
        edges = [0, *borders, len(parameters)]
        least = min(share(parameters, flops, a, b) for a, b in itertools.pairwise(edges))
        if least > best[1]:
            best = tuple(b - a for a, b in itertools.pairwise(edges)), least
    return best


# ---- one model -------------------------------------------------------------------------------------------------------


def measure(name: str) -> dict[str, Any]:
    """The result of one model."""
    torch.set_num_threads(1)
    started = time.time()
    parameters, flops = costs(name)
    result: dict[str, Any] = {
        "model": name, "side": side_of(name), "layers": len(parameters), "parameters": sum(parameters),
        "skips": len(dataflow_of(recipe_of(name), [1] * len(parameters)).skips().forward),
    }  # fmt: skip
    if 2 * sum(parameters) * 16 > MEMORY_BYTES:
        return result | {"left_out": f"twice {sum(parameters) * 16 / 1e9:.1f} GB in float64 are more than 20 GB"}
    balances = {stages: best_balance(parameters, flops, stages) for stages in STAGES}
    result["least_share"] = {stages: least for stages, (_, least) in balances.items()}
    result["balance"] = {stages: balance for stages, (balance, _) in balances.items()}
    loss, gradients = plain(name)
    largest = _largest(g.abs().max() for g in gradients.values())
    result["error"], result["loss_error"] = {}, {}
    for stages, (balance, _) in balances.items():
        got_loss, got = pipelined(name, balance, torch.float64)
        result["loss_error"][stages] = abs(got_loss - loss) / abs(loss)
        assert gradients.keys() == got.keys(), gradients.keys() ^ got.keys()
        result["error"][stages] = _largest((got[n] - g).abs().max() for n, g in gradients.items()) / largest
    del gradients, got
    one_loss, one = pipelined(name, (len(parameters),), torch.float32)
    result["same_bits"] = {}
    for stages, (balance, _) in balances.items():
        got_loss, got = pipelined(name, balance, torch.float32)
        result["same_bits"][stages] = got_loss == one_loss and all(torch.equal(got[n], g) for n, g in one.items())
    return result | {"seconds": round(time.time() - started, 1)}


def _largest(values: Iterable[Tensor]) -> float:
    """NaN if one is."""
    return float(torch.stack(list(values)).max())


def is_equal(result: dict[str, Any]) -> bool:
    return (
        "error" in result
        and all(error <= WANTED_ERROR for error in (*result["error"].values(), *result["loss_error"].values()))
        and all(result["same_bits"].values())
        and min(result["least_share"].values()) >= LEAST_SHARE
    )


# ---- all models ------------------------------------------------------------------------------------------------------


def run_missing(names: Sequence[str]) -> None:
    """Every model in a process of its own, so that one that fails takes nothing with it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = RESULTS / f"{name}.json"
        if path.exists():
            continue
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True)
        result = {"model": name, "side": side_of(name), "failed": _last_line(done.stderr)}
        if done.returncode == 0:
            result = json.loads(done.stdout.splitlines()[-1])
        path.write_text(json.dumps(result, indent=2))
        print(name, "equal" if is_equal(result) else result, flush=True)


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def all_models() -> list[str]:
    import_torchvision()
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


PAGE_TEXT = """# Models that know nothing of pipelines

The {number} classification models of torchvision, random weights, 4 images in 2 micro-batches, recompute on, by
`scripts/models.py`. Each is captured by torch.fx and cut into 2 and 4 stages, of which each holds at least a tenth of
the parameters or of the FLOPs. Error: largest difference of a gradient from that of the module itself, called
micro-batch by micro-batch in plain PyTorch (float64), over the largest gradient. Bits: losses and gradients on 1, 2 and
4 stages in float32. **{equal} of {number} are equal** (error of loss and gradients at most {wanted:g}, same bits).

| model | parameters | image | layers | skips | smallest share, 2 / 4 stages | error, 2 / 4 stages | bits |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def page(results: list[dict[str, Any]]) -> str:
    """The page of the docs: one row for each model."""
    rows = "\n".join(map(_row, results))
    return PAGE_TEXT.format(number=len(results), equal=sum(map(is_equal, results)), wanted=WANTED_ERROR, rows=rows)


def _row(result: dict[str, Any]) -> str:
    if "error" not in result:
        why = result.get("left_out") or result.get("failed")
        return f"| {result['model']} | {result.get('parameters', 0) / 1e6:.1f} M | {result['side']} | | | | {why} | |"
    shares = " / ".join(f"{value:.0%}" for value in result["least_share"].values())
    errors = " / ".join(f"{value:.0e}" for value in result["error"].values())
    bits = "same" if all(result["same_bits"].values()) else "different"
    return (
        f"| {result['model']} | {result['parameters'] / 1e6:.1f} M | {result['side']} | {result['layers']} "
        f"| {result['skips']} | {shares} | {errors} | {bits} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--one", help="measure one model and print its result as JSON")
    parser.add_argument("--table", action="store_true", help="only write the page, from the results that are there")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    if not arguments.table:
        run_missing(arguments.models or all_models())
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    PAGE.write_text(page(results))
    print(f"{sum(map(is_equal, results))} of {len(results)} equal; {PAGE} written")


if __name__ == "__main__":
    main()
