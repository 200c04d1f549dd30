"""Looks at one layer: bytes by watching its operations, seconds by the clock or from what its operations are."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from pipetrain.costs import LayerCost
from pipetrain.profile.bench import LayerOnBench, Observed
from pipetrain.profile.counting import KernelTime, Watch, no_time

# What makes the optimizer of the parameters of a layer.
MakeOptimizer = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
_FEWEST, _MOST, _ENOUGH_S = 3, 20, 0.4  # repetitions, and seconds behind which there are enough of them
_IN_FLIGHT = 4  # several forwards follow each other, as in a pipeline: memory is used again then


def count(bench: LayerOnBench, make_optimizer: MakeOptimizer, time_of: KernelTime = no_time) -> Observed:
    """Runs a layer once in each way and counts; the tensors may be without memory."""
    bench.forward(keep_graph=True)
    bench.backward(bench.gradients())  # once unwatched: the engine learns what the layer is like; gradients are made
    order, originals = list(bench.values), bench.values
    bench.values = {value: _copied(x) for value, x in originals.items()}
    watch = Watch(_tensors([*_state(bench.module), *bench.values.values(), *bench.targets]), time_of)
    with watch:
        outputs = bench.forward(keep_graph=True)
        forward_s, forward_bytes = watch.seconds, watch.peak_bytes
        graph_bytes = watch.alive_bytes(without=_tensors(outputs.values()))
        # What the graph keeps of them stays alive when nobody else holds them.
        held = [_reference(bench.values[value]) for value in order]
        held += [_reference(outputs.get(value)) for value, _ in bench.made()]  # the loss has taken the last layer's
        gradients = bench.gradients()
        bench.values, outputs = {}, {}
        keeps = tuple(ref is not None and not ref.expired() for ref in held)
        watch.restart()
        bench.backward(gradients)
        backward_s, backward_bytes = watch.seconds, watch.peak_bytes
        bench.values = originals
        bench.forward(keep_graph=True)
        before = watch.alive_bytes()
        gradients = bench.gradients()
        watch.restart()
        bench.backward(gradients, split=True)
        input_s, between_bytes = watch.seconds, watch.alive_bytes(without=_tensors(gradients.values())) - before
        watch.restart()
        bench.backward_weight()
        weight_s = watch.seconds
    update_s, optimizer_bytes = _count_update(bench.module, make_optimizer, time_of)
    parameters = list(bench.module.parameters())
    return Observed(
        LayerCost(
            name=bench.stage.layers[0].name,
            forward_s=forward_s,
            backward_s=backward_s,
            input_s=input_s,
            weight_s=weight_s,
            update_s=update_s,
            parameters=sum(p.numel() for p in parameters),
            parameter_bytes=sum(_num_bytes(p) for p in parameters),
            optimizer_bytes=optimizer_bytes,
            graph_bytes=graph_bytes,
            between_bytes=max(0, between_bytes),
            forward_bytes=forward_bytes,
            backward_bytes=backward_bytes,
        ),
        keeps,
    )


def measure(bench: LayerOnBench, make_optimizer: MakeOptimizer) -> Observed:
    """Counts bytes, and takes the medians of some repetitions for the seconds."""
    observed = count(bench, make_optimizer)
    clock = _Clock(bench.stage.random.device)
    started = time.perf_counter()
    for number in range(_MOST):
        if number >= _FEWEST and time.perf_counter() - started > _ENOUGH_S:
            break
        for m in range(_IN_FLIGHT):
            clock.time("forward", partial(bench.forward, m, keep_graph=False))
        for m in range(_IN_FLIGHT):
            bench.recompute(m)
            gradients = bench.gradients()
            if m % 2 == 0:
                clock.time("backward", partial(bench.backward, gradients, m))
            else:
                clock.time("input", partial(bench.backward, gradients, m, split=True))
                clock.time("weight", partial(bench.backward_weight, m))
    optimizer = _optimizer(bench.module, make_optimizer)
    if optimizer is not None:
        optimizer.step()
        for _ in range(_FEWEST):
            clock.time("update", lambda: _update(bench.module, optimizer))
    return Observed(
        replace(
            observed.cost,
            forward_s=clock.median("forward"),
            backward_s=clock.median("backward"),
            input_s=clock.median("input"),
            weight_s=clock.median("weight"),
            update_s=clock.median("update"),
        ),
        observed.keeps,
    )


class _Clock:
    """Seconds by what they were spent on."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._taken = device, dict[str, list[float]]()

    def time(self, what: str, work: Callable[[], object]) -> None:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        self._taken.setdefault(what, []).append(time.perf_counter() - started)

    def median(self, what: str) -> float:
        return median(self._taken.get(what, [0.0]))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _optimizer(module: nn.Module, make: MakeOptimizer) -> torch.optim.Optimizer | None:
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return make(parameters) if parameters else None


def _update(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What an update costs in the engine: each parameter's norm, in float64, and the optimizer."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
    optimizer.step()


def _count_update(module: nn.Module, make_optimizer: MakeOptimizer, time_of: KernelTime) -> tuple[float, int]:
    """Seconds and the bytes that the optimizer keeps."""
    optimizer = _optimizer(module, make_optimizer)
    if optimizer is None:
        return 0.0, 0
    optimizer.step()
    kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    touched = sum(_num_bytes(p) for p in module.parameters()) + sum(map(_num_bytes, kept))
    return time_of(0.0, 2.0 * touched), sum(_num_bytes(x) for x in kept if x.dim())


def _state(module: nn.Module) -> list[Tensor]:
    """Parameters, their gradients, buffers."""
    parameters = list(module.parameters())
    return [*parameters, *(p.grad for p in parameters if p.grad is not None), *module.buffers()]


def _tensors(values: Iterable[object]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor)]


def _copied(x: object) -> object:
    return x.clone() if isinstance(x, Tensor) else x


def _reference(x: object) -> StorageWeakRef | None:
    return StorageWeakRef(x.untyped_storage()) if isinstance(x, Tensor) else None


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize
