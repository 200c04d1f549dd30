"""Training in plain PyTorch: one process, the whole model, one autograd graph for each micro-batch.

What a pipeline must give, written down a second time. Nothing here comes from `engine` or `schedule`: it shares with
them what a setting means (the recipe, the optimizer, the learning-rate rule) and where randomness comes from (`seeds`).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from pipetrain.config import Config
from pipetrain.derived import num_microbatches
from pipetrain.models.recipe import BATCH, Recipe, Tensors, Value, unsplit
from pipetrain.partition.split import build_layer
from pipetrain.seeds import derive_seed, name_of_call, seed_pythons_generators
from pipetrain.segment_memory import SegmentMemory
from pipetrain.training.optim import build_optimizer, learning_rate, set_learning_rate
from pipetrain.training.record import Recorder

Other = Callable[[int, str], Mapping[str, Tensor]]  # (step from 1, kind of `training.record`) -> tensors by name
_DRAWING = (
    _DropoutNd,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)


class _Layers:
    """All layers of a recipe, one after the other."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self._recipe = recipe
        self.modules = [build_layer(layer, seed) for layer in recipe.layers]
        recipe.release()
        by_name = dict(zip((layer.name for layer in recipe.layers), self.modules, strict=True))
        for (owner, owned), *others in recipe.ties:
            for layer, tied in others:
                path, _, last = tied.rpartition(".")
                setattr(by_name[layer].get_submodule(path), last, by_name[owner].get_parameter(owned))

    def full_names(self, part: int) -> Callable[[str], str]:
        """The names in the unsplit model of what is in one of the modules."""
        return self._recipe.layers[part].full_name

    def run(self, inputs: Tensors, before: Callable[[int, str], None]) -> Any:
        """The output of the last layer.

        Args:
            before: called with the place and the name of a layer before it runs.
        """
        outputs: dict[str, Any] = {}
        for place, module in enumerate(self.modules):
            name = self._recipe.layers[place].name
            arguments = [a for value in self._recipe.taken_by(place) for a in _resolve(value, outputs, inputs)]
            before(place, name)
            outputs[name] = module(*arguments)
        return outputs[self._recipe.layers[-1].name]


class _Whole:
    """The user's module as it is, not cut into anything."""

    def __init__(self, recipe: Recipe, make: Callable[[], nn.Module]) -> None:
        self.modules = [make()]
        recipe.release()

    def full_names(self, part: int) -> Callable[[str], str]:
        return lambda local: local

    def run(self, inputs: Tensors, before: Callable[[int, str], None]) -> Any:
        before(0, "")
        return self.modules[0](*inputs)


class PlainModel:
    """A recipe's model in one process: the module that the user gave where there is one, else its layers in order.

    Attributes:
        parameters: each use of a tied one is listed, all of them the same object.
    """

    def __init__(self, recipe: Recipe, seed: int, device: torch.device, *, as_layers: bool = False) -> None:
        """
        Args:
            as_layers: take the layers also where there is a module of the user's.
        """
        self.recipe = recipe
        is_whole = recipe.whole is not None and not as_layers
        self._body = _Whole(recipe, recipe.whole) if is_whole and recipe.whole else _Layers(recipe, seed)
        for module in self._body.modules:
            module.to(device).double()
        self.parameters: dict[str, nn.Parameter] = dict(self._named("named_parameters"))
        if is_whole:
            by_name = dict(self._body.modules[0].named_parameters(remove_duplicate=False))
            layers = {layer.name: layer for layer in recipe.layers}
            uses = [layers[layer].full_name(parameter) for tie in recipe.ties for layer, parameter in tie]
            self.parameters |= {use: by_name[unsplit(use)] for use in uses}
        self.modules: dict[str, nn.Module] = dict(self._named("named_modules"))
        norms = {id(m): m for m in self.modules.values() if isinstance(m, _BatchNorm) and m.running_mean is not None}
        self._memories = [m for m in self.modules.values() if isinstance(m, SegmentMemory)]
        self._remembered: dict[int, list[Tensor | None]] = {}  # by micro-batch: its rows are streams of their own
        self.batch_norms = [MiniBatchNorm(module) for module in norms.values()]
        self._seed, self._step, self._microbatch = seed, 0, 0
        self._place: int | None = None
        self._calls: Counter[str] = Counter()
        for place, module in enumerate(self._body.modules):
            for local, part in module.named_modules():
                if local and _may_draw(part):
                    part.register_forward_pre_hook(self._seed_call(place, self._body.full_names(place)(local)))

    def _named(self, what: str) -> Iterator[tuple[str, Any]]:
        for place, module in enumerate(self._body.modules):
            for local, found in getattr(module, what)():
                yield self._body.full_names(place)(local), found

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers under their full names."""
        saved = {
            self._body.full_names(place)(local)
            for place, module in enumerate(self._body.modules)
            for local in module.state_dict()
        }
        return {name: buffer for name, buffer in self._named("named_buffers") if name in saved}

    def forward(self, inputs: Tensors, step: int, microbatch: int) -> Any:
        """The model's output; randomness as `pipetrain.seeds` promises it."""
        self._step, self._microbatch = step, microbatch

        def before(place: int, name: str) -> None:
            self._place = place
            self._calls.clear()
            _seed_all(derive_seed(self._seed, step, name, microbatch))

        for norm in self.batch_norms:
            norm.counts = True
        for memory, state in zip(self._memories, self._remembered.get(microbatch, ()), strict=False):
            memory.state = state
        output = self._body.run(inputs, before)
        self._remembered[microbatch] = [memory.state for memory in self._memories]
        for memory in self._memories:
            memory.state = None
        # What torch.utils.checkpoint runs again in the backward draws the same, and is not counted again.
        self._place = None
        self._calls.clear()
        for norm in self.batch_norms:
            norm.counts = False
        return output

    def draws_outside_of_modules(self, inputs: Tensors) -> bool:
        """Whether a forward draws numbers of its own, between the calls of its modules: no seed is promised for those.

        Found by two forwards that differ in nothing but the generator's state after each module.
        """
        outputs = []
        for noise in (1, 2):
            hooks = [
                part.register_forward_hook(lambda *_, noise=noise: _seed_all(noise))
                for module in self._body.modules
                for part in module.modules()
                if _may_draw(part)
            ]
            self._step, self._microbatch = 0, 0
            self._calls.clear()
            _seed_all(noise)
            with torch.no_grad():
                outputs.append(self._body.run(inputs, lambda place, name: None))
            for hook in hooks:
                hook.remove()
        first, second = (tree_leaves(output) for output in outputs)
        return not all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, Tensor))

    def _seed_call(self, place: int, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            if self._place in (place, None):  # a module may be part of several
                self._calls[name] += 1
                called = name_of_call(name, self._calls[name])
                _seed_all(derive_seed(self._seed, self._step, called, self._microbatch))

        return hook


def _seed_all(number: int) -> None:
    torch.manual_seed(number)
    seed_pythons_generators(number)


def _may_draw(module: nn.Module) -> bool:
    """Of torch's own modules those that draw, of all others those without children."""
    if type(module).__module__.startswith("torch.nn."):
        return isinstance(module, _DRAWING)
    return next(module.children(), None) is None


def _resolve(value: Value, outputs: dict[str, Any], inputs: Tensors) -> tuple[Any, ...]:
    if value.layer == BATCH:
        return inputs if value.element is None else (inputs[int(value.element)],)
    output = outputs[value.layer]
    return (output if value.element is None else output[value.element],)


class MiniBatchNorm:
    """The running statistics of one BatchNorm: updated once a step, from all that it saw in the mini-batch."""

    def __init__(self, module: Any) -> None:
        self._module, self._momentum = module, module.momentum
        module.momentum = 0.0  # its own updates, one for each micro-batch, change nothing
        self.counts = False
        self._seen: list[Tensor] = []
        module.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if module.training and self.counts:
            # A copy: what comes behind may change it in place.
            self._seen.append((arguments[0] if arguments else keywords["input"]).detach().clone())

    @torch.no_grad()
    def end_of_step(self, num_steps: int) -> None:
        """Takes in what the module saw since the last step; `num_steps` mini-batches so far, this one too."""
        if not self._seen:
            return
        seen = torch.cat(self._seen).transpose(0, 1).flatten(1)  # [channels, everything else]
        self._seen.clear()
        share = 1 / num_steps if self._momentum is None else self._momentum
        self._module.running_mean.lerp_(seen.mean(1), share)
        self._module.running_var.lerp_(seen.var(1, unbiased=True), share)
        self._module.num_batches_tracked.fill_(num_steps)


def train(
    model: PlainModel, cfg: Config, batches: Iterable[tuple[Tensors, Tensors]], recorder: Recorder, other: Other
) -> None:
    """Does each step that the other run did, from the weights that it had, and records what must have come out.

    On its own this model would drift away: Adam divides by the root of the second moment, which makes of a gradient
    that is all rounding a step of any size. So a step is two: from the other run's weights to gradients of its own,
    and from the other run's gradients to weights of its own. The first step starts from the seed.

    Args:
        batches: (inputs, targets) of each mini-batch in order, [batch, ...] each.
        other: what the other run recorded.
    """
    first_uses = {id(p): name for name, p in reversed(model.parameters.items())}
    own = {name: p for name, p in model.parameters.items() if first_uses[id(p)] == name}
    optimizer = build_optimizer(cfg.optimizer, own)
    for step, (inputs, targets) in enumerate(batches):
        if step > 0:
            _copy(model.parameters, other(step, "weight"))
            _copy(model.buffers(), other(step, "buffer"))
        optimizer.zero_grad()
        loss = _backward(model, step, inputs, targets, num_microbatches(cfg))
        recorder.before_clipping(model.parameters)
        norm = _clip(own.values(), cfg.grad_clip)
        recorder.after_clipping(model.parameters)
        gradients = other(step + 1, "gradient")
        for name, parameter in own.items():
            parameter.grad = gradients[name].to(parameter.device) if name in gradients else None
        _clip(own.values(), cfg.grad_clip)
        set_learning_rate(optimizer, learning_rate(cfg.optimizer.lr, cfg.lr_rule, step))
        optimizer.step()
        buffers = model.buffers()
        recorder.write(step + 1, loss=loss, norm=norm, parameters=model.parameters, buffers=buffers, optimizer={})


def _backward(model: PlainModel, step: int, inputs: Tensors, targets: Tensors, number: int) -> float:
    """Gradients of the mean over the mini-batch, in `number` micro-batches; returns that mean."""
    total = model.recipe.count(targets)
    loss_sum = 0.0
    for m, (x, y) in enumerate(_microbatches(inputs, targets, number)):
        loss = model.recipe.loss_sum(model.forward(x, step, m), y)
        (loss / total).backward()
        loss_sum += loss.item()
    for norm_layer in model.batch_norms:
        norm_layer.end_of_step(step + 1)
    return loss_sum / total


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def _microbatches(inputs: Tensors, targets: Tensors, number: int) -> Iterator[tuple[Tensors, Tensors]]:
    pieces = [tensor.tensor_split(number) for tensor in (*inputs, *targets)]
    for row in zip(*pieces, strict=True):
        yield row[: len(inputs)], row[len(inputs) :]


def _clip(parameters: Iterable[nn.Parameter], limit: float | None) -> float:
    """Scales the gradients as `torch.nn.utils.clip_grad_norm_` does, written out; returns their norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    if limit is not None and norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / (norm + 1e-6))
    return norm
