"""A Transformer and an AmoebaNet on two cores: a plain loop, one stage, and two stages of each engine."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import Pipetrain, Work, of_torch, on_rank_0, plain, torchgpipe_step
from measure import cell, in_processes, in_turns, median, message_s, ratios, seconds_per_step

from pipetrain.config import TextConfig, TransformerConfig
from pipetrain.models import build
from pipetrain.models.amoebanet import amoebanet

MICRO_BATCHES = 32
STEPS = {"transformer": 3, "amoebanet": 6}
SCHEDULES = ("gpipe", "1f1b")
_MESSAGE_BYTES = {
    "transformer": 128 * 256 * 4,
    "amoebanet": 8 * (96 * 14 * 14 + 64 * 28 * 28) * 4,
}  # between the stages


def work_of(model: str, num_stages: int) -> Work:
    """A mini-batch of 32 micro-batches of the default Transformer, or of the AmoebaNet that learns Fashion-MNIST."""
    generator = torch.Generator().manual_seed(0)
    if model == "transformer":
        sizes = {k: v for k, v in vars(TransformerConfig()).items() if k != "name"} | {"dropout": 0.0}
        length = TextConfig().seq_len
        recipe = build("transformer", **sizes, vocab_size=256, seq_len=length)
        tokens = torch.randint(0, 256, (MICRO_BATCHES, length + 1), generator=generator)
        inputs, targets, balance = tokens[:, :-1], tokens[:, 1:], [4, 4]
    else:
        recipe = amoebanet(
            genotype="D",
            layers=6,
            filters=16,
            stem="small",
            dropout=0.0,
            drop_path=0.0,
            drop_path_steps=0,
            aux_weight=0.0,
            label_smoothing=0.1,
            bn_momentum=0.1,
            bn_eps=1e-5,
            channels=1,
            image_size=(28, 28),
            num_classes=10,
        )
        inputs = torch.randn(8 * MICRO_BATCHES, 1, 28, 28, generator=generator)
        targets, balance = torch.randint(0, 10, (8 * MICRO_BATCHES,), generator=generator), [4, 6]
    return Work(
        recipe,
        balance if num_stages == 2 else [len(recipe.layers)],
        inputs,
        targets,
        MICRO_BATCHES,
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    )


def _one_process(model: str) -> dict[str, list[float]]:
    work, two = work_of(model, 1), work_of(model, 2)
    contestants = {"plain": plain(work), "one stage": Pipetrain("gpipe", work), "torchgpipe": torchgpipe_step(two)}
    return in_turns(contestants, STEPS[model])


def _two_processes(model: str, name: str) -> dict[str, list[float]]:
    """One stage on rank 0, while the other one waits, and two stages."""
    work, one = work_of(model, 2), work_of(model, 1)
    ours, theirs = Pipetrain(name, work), of_torch(name, work)
    assert theirs is not None
    alone = on_rank_0(plain(one) if dist.get_rank() == 0 else None)
    times = in_turns({"two stages": ours, "torch": theirs, "plain": alone}, STEPS[model])
    link_s = message_s(_MESSAGE_BYTES[model])
    steps = [(seconds_per_step(ours, 1), ours.simulated_s(link_s)) for _ in range(3)]
    return times | {"simulated / measured": [simulated / measured for measured, simulated in steps]}


def measure(folder: Path) -> dict[str, Any]:
    """Ratios of speeds, medians of the rounds."""
    found: dict[str, Any] = {}
    for model in STEPS:
        alone = cell(folder / "real", f"{model}_alone", lambda m=model: in_processes(1, _one_process, m))  # type: ignore
        found[model] = {
            "plain_s": median(alone["plain"]),
            "one stage / plain": median(ratios(alone["plain"], alone["one stage"])),
            "torchgpipe on 2 / plain": median(ratios(alone["plain"], alone["torchgpipe"])),
        }
        one_stage = found[model]["one stage / plain"]
        for name in SCHEDULES:
            both = cell(
                folder / "real",
                f"{model}_{name}",
                lambda m=model, n=name: in_processes(2, _two_processes, m, n),  # type: ignore
            )
            found[model][name] = {
                "2 stages / plain": median(ratios(both["plain"], both["two stages"])),
                "2 stages / 1 stage": median(ratios(both["plain"], both["two stages"])) / one_stage,
                "2 stages / torch": median(ratios(both["torch"], both["two stages"])),
                "simulated / measured step": median(both["simulated / measured"]),
            }
    return found
