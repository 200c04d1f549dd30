"""Rules about stale schedules."""

import math

from pipetrain.config import AUTO, AmoebaNetConfig, Config, SgdConfig, TransformerConfig, TransformerXLConfig
from pipetrain.derived import ONE_MICRO_BATCH, num_microbatches, num_replicas, stale_family
from pipetrain.rules.words import shown
from pipetrain.schedule import ALWAYS, NEVER
from pipetrain.schedule.stale import CURRENT, REPLAY, TIED, WEIGHTS
from pipetrain.suggest import one_of

CORRECTORS = ("error_feedback", "spike_compensation", "pipemare")


def check_stale(cfg: Config, num_ranks: int, problems: list[str]) -> None:
    """Adds what is wrong with the settings by themselves.

    Args:
        num_ranks: 0 where it is not known yet.
    """
    stale = cfg.stale
    for key, value, allowed in (("weights", stale.weights, WEIGHTS), ("tied", stale.tied, TIED)):
        if value not in allowed:
            problems.append(f"stale.{key}={value}: no such choice. {one_of(value, allowed)}")
    for corrector in stale.correctors:
        if corrector not in CORRECTORS:
            given = f"stale.correctors=[{','.join(stale.correctors)}]"
            problems.append(f"{given}: {corrector} is none. {one_of(corrector, CORRECTORS)}")
    numbers = [("warmup_steps", stale.warmup_steps, 0), ("drain_every", stale.drain_every, 1)]
    for key, number, least in (*numbers, ("anneal_steps", stale.anneal_steps, 1)):
        if number < least:
            problems.append(f"stale.{key}={number} must be at least {least}")
    if not 0 < stale.feedback < math.inf:
        problems.append(f"stale.feedback={stale.feedback} must be greater than 0 and finite; 1 to 8 are common values")
    elif stale.feedback != 1 and "error_feedback" not in stale.correctors:
        problems.append(
            f"stale.feedback={stale.feedback:g} is for stale.correctors=[error_feedback]; type that as well, or leave "
            "it out"
        )
    if stale_family(cfg) is None or stale.drain_every < 1:
        return
    name = f"schedule={cfg.schedule}"
    if cfg.action == "check":
        problems.append(
            f"action=check compares synchronous runs, but {name} is stale; use action=train, or schedule=gpipe"
        )
    _check_micro_batches(cfg, name, num_ranks, problems)
    _check_weights(cfg, problems)
    _check_drains(cfg, problems)
    sgd = cfg.optimizer
    has_momentum = isinstance(sgd, SgdConfig) and sgd.momentum > 0 and not sgd.nesterov
    if "spike_compensation" in stale.correctors and not has_momentum:
        problems.append(
            "stale.correctors=[spike_compensation] is for SGD with plain momentum; use optimizer=sgd "
            "optimizer.momentum=0.9, or another corrector"
        )
    if cfg.ema is not None:
        problems.append(f"ema={cfg.ema}: stages are at different steps under {name}; use ema=null")
    if isinstance(cfg.model, AmoebaNetConfig):
        problems.append(
            f"model={cfg.model.name} has BatchNorm, whose running statistics would be of many versions of the weights "
            f"under {name}; use a synchronous schedule, such as schedule=1f1b"
        )
    if isinstance(cfg.model, TransformerXLConfig) and cfg.model.shared_biases and num_ranks > 1:
        problems.append(tied_apart("model.shared_biases=true", cfg.schedule, "model.shared_biases=false"))
    is_tied = isinstance(cfg.model, TransformerConfig | TransformerXLConfig) and cfg.model.tied
    if is_tied and cfg.schedule != "ouroboros" and num_ranks > 1:
        problems.append(tied_apart("model.tied=true", cfg.schedule, "model.tied=false"))


def tied_apart(what: str, schedule: str, remedy: str) -> str:
    """Why weights cannot be shared by devices that do not wait for each other."""
    return (
        f"{what}: a matrix that two devices share can only be updated when both have its gradient, but "
        f"schedule={schedule} waits for nobody; use schedule=ouroboros, which has the first and the last stage on one "
        f"device, or {remedy}"
    )


def _check_micro_batches(cfg: Config, name: str, num_ranks: int, problems: list[str]) -> None:
    number, replicas = num_microbatches(cfg), num_replicas(cfg)
    if cfg.data_parallel == AUTO:
        problems.append(
            f"data_parallel=auto: under {name} the devices of a pipeline decide how stale gradients are, so it is not "
            "the planner's to choose; type a number"
        )
    if cfg.micro_batches == AUTO and cfg.schedule not in ONE_MICRO_BATCH:
        problems.append(
            f"micro_batches=auto: under {name} they decide how stale gradients are, so they are not the planner's to "
            "choose; type a number, or leave micro_batches out"
        )
    elif cfg.schedule in ONE_MICRO_BATCH and number != replicas:
        whole = "the whole mini-batch" if replicas == 1 else f"the mini-batch of one of the {replicas} replicas"
        problems.append(
            f"micro_batches={number}: {name} updates after every micro-batch, which is {whole}; leave "
            "micro_batches out, or use schedule=bounded, which updates after so many"
        )
    elif cfg.schedule == "pipedream_2bw" and number < num_ranks * replicas:
        problems.append(
            f"micro_batches={number}: {name} needs at least one for each of the {num_ranks * replicas} devices; use "
            f"micro_batches={num_ranks * replicas} and a batch_size of at least that"
        )


def _check_weights(cfg: Config, problems: list[str]) -> None:
    policies = cfg.recompute if isinstance(cfg.recompute, list) else [cfg.recompute]
    for weights, wanted, why in (
        (REPLAY, ALWAYS, "runs every forward again"),
        (CURRENT, NEVER, "goes back through the old activations"),
    ):
        if cfg.stale.weights == weights and any(policy != wanted for policy in policies):
            problems.append(
                f"stale.weights={weights} {why}, but recompute={shown(cfg.recompute)}; use recompute={wanted}"
            )
    if cfg.stale.weights == CURRENT and cfg.precision == "bf16":
        problems.append(
            "stale.weights=current with precision=bf16: autocast keeps copies of the old weights, so the newest would "
            "be used in some places only; use stale.weights=replay, or precision=fp32"
        )


def _check_drains(cfg: Config, problems: list[str]) -> None:
    """Whatever needs one state of the whole model happens at a drain; a resumed run drains where the other one did."""
    every = cfg.stale.drain_every
    numbers = {"eval.every": cfg.eval.every, "checkpoint.every": cfg.checkpoint.every, "steps": cfg.steps or 0}
    wrong = {key: number for key, number in numbers.items() if number % every}
    if wrong:
        whole = math.gcd(*numbers.values())
        fitting = next(n for n in range(min(whole, every), 0, -1) if whole % n == 0)
        multiples = " ".join(f"{key}={every * max(1, round(number / every))}" for key, number in wrong.items())
        given = " ".join(f"{key}={number}" for key, number in wrong.items())
        problems.append(
            f"{given}: no multiple of stale.drain_every={every}, and only then is the pipeline empty; use {multiples}, "
            f"or stale.drain_every={fitting}"
        )
