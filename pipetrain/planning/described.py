"""Costs on a device that is not here: from what every operation computes and moves, and a description of the device."""

from collections.abc import Sequence
from functools import partial

import torch

from pipetrain.config import DeviceConfig
from pipetrain.costs import Link
from pipetrain.errors import ConfigError
from pipetrain.models import Recipe
from pipetrain.profile.bench import Bench, Conditions
from pipetrain.profile.counting import KernelTime
from pipetrain.profile.observe import count
from pipetrain.profile.store import Profile
from pipetrain.training.data import full_batch
from pipetrain.training.job import Job
from pipetrain.training.optim import build_optimizer


def described_profile(job: Job, recipe: Recipe, signatures: Sequence[str], rows: Sequence[int]) -> Profile:
    """Runs the layers on tensors without memory: a model of any size can be looked at on a laptop.

    Raises:
        ConfigError: if a layer needs values to run.
    """
    cfg, device = job.cfg, job.cfg.plan.device
    assert device is not None
    inputs, targets = full_batch(cfg, job.data)
    at: list[str] = []
    observe = partial(
        count, make_optimizer=partial(build_optimizer, cfg.optimizer), time_of=kernel_time(device, cfg.precision)
    )
    dtype = torch.float64 if cfg.precision == "fp64" else None
    # There is no autocast without values: with bf16 times are those of bfloat16, bytes those of float32.
    conditions = Conditions(torch.device("meta"), cfg.seed, dtype, None, observe, at.append)
    bench, costs = Bench(recipe, signatures, conditions), {}
    for number in rows:
        # A batch of the data may have fewer samples than are planned for: only shapes count here.
        *some, compared = [
            torch.empty(number, *tensor.shape[1:], dtype=tensor.dtype, device="meta") for tensor in (*inputs, targets)
        ]
        try:
            costs[number] = bench.run(tuple(some), (compared,))
        except (RuntimeError, NotImplementedError) as error:
            raise ConfigError(
                f"layer {at[-1]} cannot be planned for plan.device={device.name}, since it cannot run on tensors "
                f"without values: {str(error).splitlines()[0]}; leave plan.device out to measure it here"
            ) from error
    gb_per_s = device.link_gb_per_s * 1e9 * device.efficiency
    return Profile(
        about={},
        memory_bytes={device.name: device.memory_gib * 2**30},
        slowness={device.name: 1.0},
        link=Link(device.link_us * 1e-6, gb_per_s),
        sums=Link(2 * device.link_us * 1e-6, gb_per_s),  # there and back
        engine_s=0.0,
        crowding=1.0,
        disturbed=False,
        process_bytes=0,
        costs=costs,
    )


def kernel_time(device: DeviceConfig, precision: str) -> KernelTime:
    """An operation takes as long as its arithmetic or its memory, whichever is slower: the roofline of Williams et al.
    2009, at a share of the device's speeds."""
    tflops = {"fp32": device.fp32_tflops, "bf16": device.bf16_tflops, "fp64": device.fp64_tflops}[precision]
    flops_per_s, bytes_per_s = (x * device.efficiency for x in (tflops * 1e12, device.memory_gb_per_s * 1e9))

    def seconds(flops: float, num_bytes: float) -> float:
        return device.kernel_us * 1e-6 + max(flops / flops_per_s, num_bytes / bytes_per_s)

    return seconds
