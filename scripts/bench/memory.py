"""Peak memory of a step: bytes of the tensors that live at once, as torch's allocator counts them.

What lived before the step (weights, optimizer) is not part of it; gradients are. The allocator counts for the thread
that asks, so torchgpipe's tasks run in that thread here, in the order in which its own threads would get them.
"""

import json
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchgpipe.pipeline
from contestants import Pipetrain, Work, of_torch, torchgpipe_step
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


class _InThisThread:
    """A queue of torchgpipe's for tasks and the one for their results."""

    def __init__(self) -> None:
        self._results: deque[Any] = deque()

    def put(self, task: Any) -> None:
        self._results.append((True, (task, task.compute())))

    def get(self) -> Any:
        return self._results.popleft()


@contextmanager
def _no_workers(devices: list[torch.device]) -> Iterator[tuple[list[_InThisThread], list[_InThisThread]]]:
    queues = [_InThisThread() for _ in devices]
    yield queues, queues


def _peak_of_torchgpipe(work: Work, policy: str) -> int:
    """Of all its partitions together: they are one process."""
    torchgpipe.pipeline.spawn_workers = _no_workers
    return peak_bytes(torchgpipe_step(work, policy))


def on_all_ranks(value: int) -> list[int]:
    values = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    values[dist.get_rank()] = value
    dist.all_reduce(values)
    return [int(v) for v in values]


# (engine, schedule, recompute policy). torchgpipe's backward takes the micro-batches last in, first out.
MEASURED = [
    *(("pipetrain", "gpipe_lifo", policy) for policy in POLICIES),
    *(("torchgpipe", "gpipe_lifo", policy) for policy in POLICIES),
    *((engine, schedule, "never") for schedule in ("gpipe", "1f1b") for engine in ("pipetrain", "torch")),
]


def _rank(model: str, engine: str, schedule: str, policy: str) -> list[int]:
    """A process of its own for each: what one leaves behind, the allocator's count would take for the next one's."""
    work = work_of(model, 2)
    if engine == "torchgpipe":
        return [_peak_of_torchgpipe(work, policy) if dist.get_rank() == 0 else 0]
    step = Pipetrain(schedule, work, policy) if engine == "pipetrain" else of_torch(schedule, work)
    assert step is not None
    return on_all_ranks(peak_bytes(step))


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
    """Peaks by model, engine, schedule and policy, and GPipe's as K and M grow."""

    def peaks(model: str) -> dict[str, list[int]]:
        return {
            " ".join(each): cell(
                folder / "memory",
                "_".join((model, *each)),
                lambda each=each: in_processes(2, _rank, model, *each),  # type: ignore
            )
            for each in MEASURED
        }

    found: dict[str, Any] = {model: peaks(model) for model in ("transformer", "amoebanet")}
    found["sweep"] = {
        f"K{k}_M{m}": cell(folder / "memory", f"sweep_K{k}_M{m}", lambda k=k, m=m: in_processes(k, _sweep_rank, m))  # type: ignore
        for k, m in SWEEP
    }
    return found
