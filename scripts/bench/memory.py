"""Peak memory of a step: bytes of the tensors that live at once, as torch's allocator counts them.

What lived before the step (weights, optimizer) is not part of it; gradients are. torchgpipe is not among them: it
allocates in threads of its own, and the allocator counts for the thread that asks.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import Pipetrain, Work, of_torch
from measure import Step, cell, in_processes
from real import work_of
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pipetrain.models import LayerRecipe, Recipe

POLICIES = ("never", "except_last", "always")
SAMPLES, WIDTH, LAYERS = 256, 256, 16  # of the sweep
SWEEP = [(k, m) for k in (1, 2, 4) for m in (1, 2, 4, 8, 16, 32)]


def peak_bytes(step: Step) -> int:
    """The most that was allocated at once since the begin of a step, in this process."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def on_all_ranks(value: int) -> list[int]:
    values = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    values[dist.get_rank()] = value
    dist.all_reduce(values)
    return [int(v) for v in values]


def _policies_rank(model: str) -> dict[str, Any]:
    work = work_of(model, 2)
    found: dict[str, Any] = {"pipetrain": {}}
    for policy in POLICIES:
        found["pipetrain"][policy] = on_all_ranks(peak_bytes(Pipetrain("gpipe_lifo", work, policy)))
    for name in ("gpipe", "1f1b"):
        found[f"pipetrain {name}"] = on_all_ranks(peak_bytes(Pipetrain(name, work, "never")))
        theirs = of_torch(name, work)
        assert theirs is not None
        found[f"torch {name}"] = on_all_ranks(peak_bytes(theirs))
    return found


class _Block(nn.Module):
    """Keeps four tensors of its input's size for its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).sigmoid().cos().exp()


def _sweep_rank(num_microbatches: int) -> list[int]:
    world = dist.get_world_size()
    recipe = Recipe(
        layers=tuple(LayerRecipe(f"layer{i}", _Block) for i in range(LAYERS)),
        loss_sum=lambda output, targets: (output - targets[0]).square().sum(),
        count=lambda targets: targets[0].numel(),
    )
    x = torch.randn(SAMPLES, WIDTH)
    work = Work(
        recipe, [LAYERS // world] * world, x, x, num_microbatches, lambda parameters: torch.optim.SGD(parameters, 0.1)
    )
    gradients = LAYERS // world * (WIDTH + 1) * WIDTH * 4
    return [peak - gradients for peak in on_all_ranks(peak_bytes(Pipetrain("gpipe", work, "always")))]


def measure(folder: Path) -> dict[str, Any]:
    """Peaks by policy and engine, and GPipe's as K and M grow."""
    found: dict[str, Any] = {
        model: cell(folder / "memory", model, lambda m=model: in_processes(2, _policies_rank, m))  # type: ignore
        for model in ("transformer", "amoebanet")
    }
    found["sweep"] = {
        f"K{k}_M{m}": cell(folder / "memory", f"sweep_K{k}_M{m}", lambda k=k, m=m: in_processes(k, _sweep_rank, m))  # type: ignore
        for k, m in SWEEP
    }
    return found
