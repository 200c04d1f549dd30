"""Plain PyTorch against which the engine is checked. Imports nothing from pipetrain.engine or pipetrain.schedule."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipetrain.check.reference import PlainModel
from pipetrain.models import Recipe
from pipetrain.partition.split import build_layer
from pipetrain.seeds import derive_seed


def plain_model(recipe: Recipe, seed: int) -> nn.Sequential:
    """The whole model as one module; tied parameters are one object."""
    model = nn.Sequential()
    for layer in recipe.layers:
        model.add_module(layer.name.replace(".", "_"), build_layer(layer, seed))
    for (first_layer, first_name), *others in recipe.ties:
        shared = getattr(model, first_layer).get_parameter(first_name)
        for layer, name in others:
            owner, _, last = name.rpartition(".")
            setattr(getattr(model, layer).get_submodule(owner), last, shared)
    return model


def plain_gradients(recipe: Recipe, model: nn.Sequential, inputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of the whole mini-batch at once, as a mean over its valid tokens, and its gradients in `.grad`."""
    model.zero_grad()
    loss = recipe.loss_sum(model(inputs), (targets,)) / recipe.count((targets,))
    loss.backward()
    return loss.detach()


def microbatch_loss(
    recipe: Recipe, model: nn.Sequential, pieces: list[tuple[Tensor, Tensor]], seed: int, step: int
) -> float:
    """Loss sum over micro-batches with the random layers drawing what `pipetrain.seeds` promises; adds to `.grad`."""
    total = sum(recipe.count((targets,)) for _, targets in pieces)
    loss_sum = 0.0
    now = 0
    calls: dict[str, int] = {}

    def seed_call(name: str) -> Callable[[nn.Module, object], None]:
        def hook(module: nn.Module, args: object) -> None:
            calls[name] = calls.get(name, 0) + 1
            torch.manual_seed(derive_seed(seed, step, name if calls[name] == 1 else f"{name}@{calls[name]}", now))

        return hook

    for layer, module in zip(recipe.layers, model, strict=True):
        for local, part in module.named_modules():
            if isinstance(part, nn.Dropout):
                part.register_forward_pre_hook(seed_call(f"{layer.name}.{local}"))
    for m, (inputs, targets) in enumerate(pieces):
        now = m
        calls.clear()
        value = inputs
        for layer, module in zip(recipe.layers, model, strict=True):
            torch.manual_seed(derive_seed(seed, step, layer.name, m))
            value = module(value)
        loss = recipe.loss_sum(value, (targets,))
        (loss / total).backward()
        loss_sum += float(loss.detach().double())
    return loss_sum


def plain_step(
    recipe: Recipe, inputs: Tensor | tuple[Tensor, ...], targets: Tensor, *, num_microbatches: int, seed: int = 0
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss sum, gradients and buffers of the first step in float64: the whole model in one graph a micro-batch."""
    model = PlainModel(recipe, seed, torch.device("cpu"))
    batch = (*(inputs if isinstance(inputs, tuple) else (inputs,)), targets)
    pieces = [
        [t.double() if t.is_floating_point() else t for t in tensor.tensor_split(num_microbatches)] for tensor in batch
    ]
    total, loss_sum = recipe.count((targets,)), 0.0
    for m, (*x, y) in enumerate(zip(*pieces, strict=True)):
        loss = recipe.loss_sum(model.forward(tuple(x), 0, m), (y,))
        (loss / total).backward()
        loss_sum += float(loss.detach())
    for batch_norm in model.batch_norms:
        batch_norm.end_of_step(1)
    gradients = {name: p.grad for name, p in model.parameters.items() if p.grad is not None}
    return loss_sum, gradients, model.buffers()
