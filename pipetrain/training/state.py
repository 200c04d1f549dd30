"""What a checkpoint holds of one stage by names of the unsplit model: weights, their average, buffers, optimizer state,
and what layers remember of the text before.

A tied parameter is stored once, under the name of its first use, with the state that belongs to it; every use is
restored from there.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipetrain.data.share import Share
from pipetrain.engine.replicas import gather_rows
from pipetrain.engine.runtime import Runtime
from pipetrain.engine.tied import Tie
from pipetrain.errors import CheckpointError
from pipetrain.training.checkpoint import Reader
from pipetrain.training.ema import WeightAverage


def collect(
    runtime: Runtime, optimizer: torch.optim.Optimizer, ties: Sequence[Tie], average: WeightAverage | None = None
) -> dict[str, Tensor]:
    """The tensors that this rank writes."""
    later_uses = {name for tie in ties for name, _ in tie.uses[1:]}
    tensors: dict[str, Tensor] = {}
    for stage in runtime.stages.values():
        tensors |= {f"model/{name}": buffer for name, buffer in stage.named_buffers()}
        replicas = runtime.transport.replicas
        tensors |= {
            f"memory/{name}": torch.cat(gather_rows(states.cpu(), replicas)) if replicas.count > 1 else states
            for name, states in stage.segments.saved().items()
        }
    for name, parameter in runtime.own_parameters.items():
        if name in later_uses:
            continue
        tensors[f"model/{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
        if average is not None and name in average.values:
            tensors[f"ema/{name}"] = average.values[name]
    return tensors


def restore(reader: Reader, runtime: Runtime, optimizer: torch.optim.Optimizer, ties: Sequence[Tie]) -> None:
    """Fills this rank's weights, buffers and optimizer state from a checkpoint of any partitioning.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.
    """
    restore_weights(reader, runtime, ties)
    _restore_optimizer(reader, runtime.own_parameters, optimizer, stored_as(ties))


@torch.no_grad()
def restore_weights(reader: Reader, runtime: Runtime, ties: Sequence[Tie], *, averaged: bool = False) -> None:
    """Fills this rank's weights and buffers alone.

    Args:
        averaged: with the average of the weights, where the checkpoint has one.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.
    """
    first_use = stored_as(ties)
    buffers = {name: b for stage in runtime.stages.values() for name, b in stage.named_buffers()}
    for name, tensor in {**runtime.own_parameters, **buffers}.items():
        average = f"ema/{first_use.get(name, name)}"
        stored = reader.get(average if averaged and average in reader else f"model/{first_use.get(name, name)}")
        if stored.shape != tensor.shape:
            raise CheckpointError(
                f"{name} is {list(stored.shape)} in the checkpoint, but {list(tensor.shape)} in the model"
            )
        tensor.copy_(stored)


def restore_memories(reader: Reader, runtime: Runtime, share: Share) -> None:
    """Fills what layers remember of the text before, also for another number of micro-batches or replicas."""
    there = reader.names("memory/")
    for stage in runtime.stages.values():
        for name in stage.segments.names:
            if f"memory/{name}" in there:
                states = reader.get(f"memory/{name}").to(runtime.device)
                own = states[share.rows(len(states))].tensor_split(share.microbatches(len(states)))
                stage.segments.restore(name, own, reader.manifest.step)


def restore_average(reader: Reader, average: WeightAverage, ties: Sequence[Tie]) -> None:
    """Fills the average of the weights; one that was switched on for a resumed run goes on from the weights.

    Raises:
        CheckpointError: if the average of a parameter is missing.
    """
    first_use = stored_as(ties)
    if reader.names("ema/"):
        for name, value in average.values.items():
            value.copy_(reader.get(f"ema/{first_use.get(name, name)}"))


def stored_as(ties: Iterable[Tie]) -> dict[str, str]:
    """Each use of a tied parameter -> the first one, whose name a checkpoint has."""
    return {name: tie.uses[0][0] for tie in ties for name, _ in tie.uses}


def _restore_optimizer(
    reader: Reader,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    first_use: Mapping[str, str],
) -> None:
    name_of = {parameter: name for name, parameter in parameters.items()}
    state: dict[int, dict[str, Tensor]] = {}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(ordered):
        name = name_of[parameter]
        prefix = f"optimizer/{first_use.get(name, name)}/"
        values = {full.removeprefix(prefix): reader.get(full) for full in reader.names(prefix)}
        if values:
            state[index] = values
    # torch's own loading casts and moves each value as the optimizer wants it; the groups stay those of the settings.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
