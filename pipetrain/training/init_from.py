"""Fine-tuning: a new run starts from the weights of another one, wherever names and shapes are the same.

Names are those of the unsplit model, so neither run's number of stages matters. What the other run has as an average of
its weights (`ema`) is taken instead of the weights: it is what that run was evaluated with.
"""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from pipetrain.data.tokenizer import BYTES
from pipetrain.engine.runtime import Runtime
from pipetrain.engine.tied import Tie
from pipetrain.errors import ConfigError
from pipetrain.models import Recipe
from pipetrain.partition.split import build_layer, stages_of_ties
from pipetrain.paths import RunPaths
from pipetrain.training import checkpoint
from pipetrain.training.checkpoint import Reader
from pipetrain.training.state import stored_as

_SHOWN = 12  # names of one kind on the console


def find_start(given: str, recipe: Recipe, tokenizer: str | None, say: Callable[[str], None]) -> Path:
    """The checkpoint that a new run starts from. Only the names and shapes of it are read.

    Args:
        given: the run folder of the other run, as typed.
        recipe: the model of the new run.
        tokenizer: identifies that of the new run, see `vocabulary.tokenizer_id`.
        say: takes a line for the user: what is taken, what is not.

    Raises:
        ConfigError: if that is no run folder, its tokens have other numbers, or no parameter there fits the model.
        CheckpointError: if the run has no usable checkpoint.
    """
    run = RunPaths(Path(given).expanduser().absolute())
    if not given or not run.checkpoints.is_dir():
        raise ConfigError(
            f"init_from={given} is no run folder with checkpoints; give one that an earlier `pipetrain` made, such as "
            "init_from=runs/NAME/TIME-ID"
        )
    path, skipped = checkpoint.find_usable(run.checkpoints)
    for reason in skipped:
        say(f"skipped a checkpoint: {reason}")
    reader = Reader(path)
    if tokenizer is not None and reader.manifest.tokenizer not in (None, tokenizer):
        raise ConfigError(
            f"init_from={given} was trained with another vocabulary: the same number is another word there; use its "
            f"own one, data.tokenizer={BYTES if reader.manifest.tokenizer == BYTES else run.tokenizer}, or leave "
            "init_from out"
        )
    parameters, buffers = _shapes(recipe)
    shapes = parameters | buffers
    fits = [name for name in shapes if _source(reader, name, shapes[name]) is not None]
    there = {name.removeprefix("model/"): list(reader.shape(name)) for name in reader.names("model/")}
    if parameters.keys().isdisjoint(fits):
        raise ConfigError(
            f"init_from={given}: no parameter there has the name and shape of one of this model, which was "
            f"{_shown(there)}, and is {_shown(shapes)}; type the model settings of that run (its "
            f"model={reader.manifest.config['model']['name']}, see .hydra/overrides.yaml there), or leave init_from out"
        )
    averaged = ", the average of its weights" if reader.names("ema/") else ""
    say(f"init_from={given}: step {reader.manifest.step}{averaged}; {len(fits)} of {len(shapes)} tensors fit")
    fresh = {name: shape for name, shape in shapes.items() if name not in set(fits)}
    other = {name: shape for name, shape in there.items() if name not in shapes}
    if fresh:
        say(f"  initialised as usual: {_listed(_one(name, fresh[name], there.get(name)) for name in fresh)}")
    if other:
        say(f"  there, but not in this model: {_listed(_one(name, other[name]) for name in other)}")
    return path


@torch.no_grad()
def load(reader: Reader, runtime: Runtime, ties: Iterable[Tie]) -> None:
    """Gives this rank's parameters and persistent buffers the values of another run, where they fit."""
    first_use = stored_as(ties)
    buffers = {name: buffer for stage in runtime.stages.values() for name, buffer in stage.named_buffers()}
    for name, tensor in {**runtime.own_parameters, **buffers}.items():
        source = _source(reader, first_use.get(name, name), list(tensor.shape))
        if source is not None:
            tensor.copy_(reader.get(source))


def _source(reader: Reader, name: str, shape: list[int]) -> str | None:
    """What the parameter or buffer `name` starts from, by its name in the checkpoint; None if nothing there fits."""
    stored = f"ema/{name}" if f"ema/{name}" in reader else f"model/{name}"
    return stored if stored in reader and reader.shape(stored) == shape else None


def _shapes(recipe: Recipe) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Shapes of the parameters and of the persistent buffers, under the names that they are stored by."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for layer in recipe.layers:
        # Our own models need no memory for this; what a user's factory computes with must be real.
        with torch.device("meta") if recipe.whole is None else contextlib.nullcontext():
            module = build_layer(layer, 0)
        persistent = module.state_dict().keys()
        parameters |= {layer.full_name(name): p for name, p in module.named_parameters()}
        buffers |= {layer.full_name(name): b for name, b in module.named_buffers() if name in persistent}
    recipe.release()
    later = {name for uses in stages_of_ties(recipe, [len(recipe.layers)]) for name, _ in uses[1:]}
    stored = {name: list(p.shape) for name, p in parameters.items() if name not in later}
    return stored, {name: list(buffer.shape) for name, buffer in buffers.items()}


def _one(name: str, shape: list[int], there: list[int] | None = None) -> str:
    return f"{name} {shape}" + (f" (there {there})" if there is not None else "")


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def _shown(shapes: dict[str, list[int]]) -> str:
    """The first tensor, to tell two models apart."""
    return next((f"{_one(name, shape)}, ..." for name, shape in shapes.items()), "empty")
