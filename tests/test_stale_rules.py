"""What is refused or explained about stale schedules before anything trains."""

from typing import Any

import pytest
from test_config import settings

from pipetrain import rules
from pipetrain.config import AmoebaNetConfig, Config, ImagesConfig, SgdConfig, TextConfig, TransformerXLConfig
from pipetrain.derived import num_microbatches, num_stages, wanted_ranks
from pipetrain.errors import ConfigError
from pipetrain.planning.choices import choices


def stale(schedule: str = "ouroboros", devices: int = 2, **changes: Any) -> Config:
    return settings(**{"schedule": schedule, "devices": devices, "steps": 200, "stale__drain_every": 100, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"devices": 1},
        {"devices": 3, "partitions": 4, "balance": [2, 2, 2, 2]},
        {"devices": "auto", "partitions": 4},
        {"model__tied": True},
        {"stale__weights": "replay"},
        {"stale__weights": "current", "recompute": "never"},
        {"eval__every": 200, "checkpoint__every": 100},
        {"schedule": "pipedream", "devices": 4},
        {"schedule": "pipedream_2bw", "devices": 4},
        {"schedule": "bounded", "devices": 4, "micro_batches": 2},
        {
            "optimizer": SgdConfig(name="sgd", momentum=0.9),
            "stale__correctors": ["spike_compensation", "pipemare"],
        },
    ],
    ids=str,
)
def test_good_settings(changes: dict[str, Any]) -> None:
    rules.check(stale(**changes), num_gpus=0)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"stale__weights": "stahs"}, "stale.weights=stahs: no such choice. Did you mean 'stash'?"),
    ({"stale__tied": "loked"}, "stale.tied=loked: no such choice. Did you mean 'locked'?"),
    ({"stale__warmup_steps": -1}, "stale.warmup_steps=-1 must be at least 0"),
    ({"stale__drain_every": 0}, "stale.drain_every=0 must be at least 1"),
    ({"stale__anneal_steps": 0}, "stale.anneal_steps=0 must be at least 1"),
    ({"stale__feedback": 4.0}, "stale.feedback=4 is for stale.correctors=[error_feedback]; type that as well"),
    ({"stale__feedback": 0.0}, "stale.feedback=0.0 must be greater than 0 and finite"),
    (
        {"stale__correctors": ["pipemare", "eror_feedback"]},
        "stale.correctors=[pipemare,eror_feedback]: eror_feedback is none. Did you mean 'error_feedback'?",
    ),
    (
        {"stale__correctors": ["spike_compensation"]},
        "stale.correctors=[spike_compensation] is for SGD with plain momentum; use optimizer=sgd",
    ),
    (
        {"stale__weights": "replay", "recompute": "never"},
        "stale.weights=replay runs every forward again, but recompute=never; use recompute=always",
    ),
    (
        {"stale__weights": "current"},
        "stale.weights=current goes back through the old activations, but recompute=always; use recompute=never",
    ),
    (
        {"stale__weights": "current", "recompute": "never", "precision": "bf16"},
        "autocast keeps copies of the old weights",
    ),
    ({"micro_batches": 4}, "micro_batches=4: schedule=ouroboros updates after every micro-batch"),
    (
        {"schedule": "bounded", "micro_batches": "auto"},
        "micro_batches=auto: under schedule=bounded they decide how stale gradients are",
    ),
    (
        {"data_parallel": "auto"},
        "data_parallel=auto: under schedule=ouroboros the devices of a pipeline decide how stale gradients are",
    ),
    (
        {"schedule": "pipedream_2bw", "devices": 4, "micro_batches": 3},
        "micro_batches=3: schedule=pipedream_2bw needs at least one for each of the 4 devices; use micro_batches=4",
    ),
    (
        {"partitions": 2},
        "partitions=2, but schedule=ouroboros runs one stage more than devices: the first device has the first and "
        "the last one, and there are 2 devices; use partitions=3 or leave partitions out, or devices=1",
    ),
    ({"schedule": "pipedream", "partitions": 3}, "runs one each, and there are 2 devices; use partitions=2"),
    ({"balance": [2, 2]}, "balance=[2,2] names 2 stages, but there are 3 stages on 2 devices"),
    (
        {"eval__every": 50, "checkpoint__every": 75},
        "eval.every=50 checkpoint.every=75: no multiple of stale.drain_every=100, and only then is the pipeline empty; "
        "use eval.every=100 checkpoint.every=100, or stale.drain_every=25",
    ),
    ({"steps": 130}, "steps=130: no multiple of stale.drain_every=100"),
    ({"schedule": "pipedream", "model__tied": True}, "model.tied=true: a matrix that two devices share"),
    ({"ema": 0.99}, "ema=0.99: stages are at different steps under schedule=ouroboros"),
    ({"action": "check"}, "action=check compares synchronous runs, but schedule=ouroboros is stale"),
    ({"model": AmoebaNetConfig(), "data": ImagesConfig()}, "model=amoebanet has BatchNorm"),
    (
        {"model": TransformerXLConfig(shared_biases=True), "data": TextConfig(order="contiguous")},
        "model.shared_biases=true: a matrix that two devices share",
    ),
    ({"schedule": "ourobors"}, "schedule=ourobors: no such choice. Did you mean 'ouroboros'?"),
]


@pytest.mark.parametrize(("changes", "text"), BAD)
def test_message_of_every_rule(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        rules.check(stale(**changes), num_gpus=0)
    assert text in str(error.value)


def test_more_modules_than_layers_are_refused() -> None:
    cfg = stale(devices=4)
    with pytest.raises(ConfigError, match="devices=4 with schedule=ouroboros makes 5 stages, but the model has only 4"):
        rules.check_model(cfg, 4, num_stages(cfg, 4))


def test_ouroboros_has_one_stage_more_than_devices() -> None:
    assert num_stages(stale(), 4) == 5
    assert wanted_ranks(stale(partitions=5)) == 4
    assert num_microbatches(stale()) == num_microbatches(stale("pipedream")) == 1
    assert num_microbatches(stale("bounded")) == 16


def test_the_planner_takes_the_steps_between_two_drains() -> None:
    (choice,) = choices(stale(balance="auto", micro_batches="auto"), 3, 8)
    assert (choice.schedule, choice.num_microbatches, choice.num_steps) == ("ouroboros", 1, 100)
