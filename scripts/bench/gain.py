"""What `balance=auto` gains over `even` on two cores, as it is predicted and as it is."""

from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from contestants import Pipetrain, Work
from measure import CPU, TIMEOUT, cell, in_processes, in_turns, median, ratios
from real import work_of

from pipetrain.config import TextConfig, TransformerConfig
from pipetrain.costs import Device
from pipetrain.engine.connect import connect
from pipetrain.models import build
from pipetrain.planning.engine_cost import engine_s
from pipetrain.planning.measuring import measure_link
from pipetrain.profile.bench import Bench, Conditions, signatures_of
from pipetrain.profile.observe import measure as measure_layer
from pipetrain.sim.balance import even
from pipetrain.sim.forecast import Choice, Setting, forecast
from pipetrain.sim.planner import plans

MODELS = ("transformer with 16,384 words", "amoebanet")
STEPS = 2


def _work_of(model: str) -> Work:
    """The default Transformer with a head that costs as much as five of its six blocks, or the AmoebaNet of `real`."""
    work = work_of(model.split()[0], 1)
    if model != "amoebanet":
        sizes = {k: v for k, v in vars(TransformerConfig()).items() if k != "name"} | {"dropout": 0.0}
        work.recipe = build("transformer", **sizes, vocab_size=16_384, seq_len=TextConfig().seq_len)
    return work


def _setting(work: Work) -> Setting:
    """Both ranks measure at the same time, as they will compute."""
    rows = -(-len(work.inputs) // work.num_microbatches)
    observe = partial(measure_layer, make_optimizer=lambda parameters: work.optimizer(list(parameters.values())))
    bench = Bench(work.recipe, signatures_of(work.recipe), Conditions(CPU, 0, None, None, observe))
    dist.barrier()
    cost = bench.run((work.inputs[:rows],), (work.targets[:rows],))
    transport = connect(CPU, TIMEOUT)
    link, own_s = measure_link(transport, CPU), engine_s(transport, CPU)
    selected = (False,) * len(cost.layers)
    return Setting(lambda rows: cost, len(work.inputs), (Device("core"),) * 2, link, selected, own_s)


def _rank(model: str) -> dict[str, Any]:
    work = _work_of(model)
    setting, number = _setting(work), len(work.recipe.layers)
    choice = Choice("1f1b", 1, work.num_microbatches, "never")
    best: list[Any] = [plans(setting, [choice])[0].balance]
    dist.broadcast_object_list(best, src=0)
    balances = {"even": even(number, 2), "auto": best[0]}
    contestants = {}
    for name, balance in balances.items():
        work.balance = balance
        contestants[name] = Pipetrain("1f1b", work)
    predicted = {name: forecast(setting, choice, balance).step_s for name, balance in balances.items()}
    return {"balances": balances, "predicted_s": predicted, "seconds": in_turns(contestants, STEPS)}


def measure(folder: Path) -> dict[str, Any]:
    """The gain in speed, and how right each prediction was."""
    found: dict[str, Any] = {}
    for model in MODELS:
        raw = cell(folder / "gain", model.replace(" ", "_"), lambda m=model: in_processes(2, _rank, m))  # type: ignore
        said, taken = raw["predicted_s"], raw["seconds"]
        found[model] = {
            "balances": raw["balances"],
            "predicted": said["even"] / said["auto"],
            "measured": median(ratios(taken["even"], taken["auto"])),
            "predicted / measured": {name: said[name] / median(taken[name]) for name in said},
        }
    return found
