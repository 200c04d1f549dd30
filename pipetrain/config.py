"""Every setting of pipetrain with its default and its meaning; those of models, data and optimizers are in `groups`.

The dataclasses are the schema: Hydra fills them from YAML files and the command line (see `cli`), and `help` is what
`pipetrain --help` prints. What values they may have is in `rules`.

No torch here: `--help` and tab completion must stay fast.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from pipetrain.groups import (
    SCHEMAS,
    AdafactorConfig,
    AdamConfig,
    AmoebaNetConfig,
    AnythingConfig,
    DataConfig,
    ImagesConfig,
    ModelConfig,
    MuonConfig,
    NadamConfig,
    OptimizerConfig,
    RmspropConfig,
    RotatedAdamConfig,
    Seq2SeqConfig,
    SgdConfig,
    SyntheticConfig,
    TextConfig,
    TransformerConfig,
    TransformerXLConfig,
    TranslationConfig,
    setting,
)
from pipetrain.schedule import POLICIES, SCHEDULES, STALE

AUTO = "auto"
# What AUTO leaves to the planner.
PLANNED = ("data_parallel", "schedule", "micro_batches", "recompute", "partitions", "balance")
BALANCES = (AUTO, "even", "least_variance")  # the rules; the others are lists


@dataclass(kw_only=True)
class LrRuleConfig:
    name: str = setting(
        "constant | linear | cosine | inverse_sqrt | exponential, each after a linear warm-up", "constant"
    )
    warmup_steps: int = setting("steps of linear warm-up from 0 to the peak", 0)
    decay_steps: int | None = setting("linear, cosine: the step at which the end is reached", None)
    end_fraction: float = setting("linear, cosine, exponential: lowest learning rate as a share of the peak", 0.0)
    decay_factor: float | None = setting("exponential: what the learning rate is multiplied by again and again", None)
    decay_every: int | None = setting("exponential: steps between two multiplications", None)


@dataclass(kw_only=True)
class EvalConfig:
    every: int = setting("evaluate on the validation split every so many steps; 0 = never", 0)
    batches: int | None = setting("at most so many batches of the split; null = all of it", None)


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = setting("write a checkpoint every so many steps (and at the end); 0 = only at the end", 0)
    keep: int = setting("how many of the newest checkpoints stay; the best one stays too", 2)


@dataclass(kw_only=True)
class StaleConfig:
    weights: str = setting(
        "what a backward sees under a stale schedule: stash (the weights of its forward, kept) | replay (the newest, "
        "with its forward run again) | current (the newest, with the old activations)",
        "stash",
    )
    tied: str = setting(
        "ouroboros, a matrix that embedding and head share: free (each takes the newest) | locked (both the same, as "
        "the paper has it: forwards wait for each other)",
        "free",
    )
    warmup_steps: int = setting("synchronous steps before the stale ones", 0)
    drain_every: int = setting("steps between two moments at which the pipeline is empty", 50)
    correctors: list[str] = field(
        default_factory=list,
        metadata={"help": "against late gradients, any of [error_feedback,spike_compensation,pipemare]"},
    )
    feedback: float = setting("error_feedback: how many times what the update before lacked is added", 1.0)
    anneal_steps: int = setting("pipemare: steps after which late stages have the whole learning rate", 1000)


@dataclass(kw_only=True)
class CheckConfig:
    steps: int = setting("action=check: compare so many steps", 3)


@dataclass(kw_only=True)
class GenerateConfig:
    into: str | None = setting("language to translate into; null = the only one that there is", None)
    beams: int = setting("translations: hypotheses that are followed at a time; 1 = greedy", 4)
    length_penalty: float = setting("translations: 0 = none, more = longer ones", 0.6)
    max_tokens: int = setting("texts: tokens that are added", 100)
    temperature: float = setting("texts: below 1 = safer, above = wilder, 0 = always the most probable token", 1.0)
    top_k: int | None = setting("texts: only so many of the most probable tokens; null = all", None)
    top_p: float = setting("texts: only the most probable tokens that together have so much probability", 1.0)
    batch_size: int = setting("lines at a time", 64)


@dataclass(kw_only=True)
class EvaluateConfig:
    split: str | None = setting("valid | test | null (test, where there is one)", None)
    sentences: int | None = setting("translations: at most so many of each language; null = all", None)


@dataclass(kw_only=True)
class DeviceConfig:
    name: str = setting("what it is called", "???")
    memory_gib: float = setting("memory for a training process", "???")
    fp32_tflops: float = setting("multiplications and additions of matrices a second, in 10^12: precision=fp32", "???")
    bf16_tflops: float = setting("the same in bfloat16", "???")
    fp64_tflops: float = setting("the same in float64", "???")
    memory_gb_per_s: float = setting("what it reads and writes a second, in 10^9 bytes", "???")
    link_gb_per_s: float = setting("what goes to another one a second, in 10^9 bytes", "???")
    link_us: float = setting("until the first byte is there", "???")
    kernel_us: float = setting("what each operation takes at least", "???")
    efficiency: float = setting("share of all these speeds that training reaches", 0.5)


@dataclass(kw_only=True)
class PlanConfig:
    device: DeviceConfig | None = setting(
        "action=plan for a device that is described and not here, see conf/device", None
    )
    devices: list[int] | None = setting("action=plan for so many of them, one plan for each number", None)
    profile: str | None = setting(
        "a profile.json of an earlier run with this model on such devices; nothing is measured then", None
    )
    memory_gib: float | None = setting("memory of each device to plan with; null = what it has", None)
    timeout_s: float = setting("seconds that measuring the layers may take", 120.0)
    cache_dir: str = setting("where measurements are kept", "~/.cache/pipetrain/profiles")


@dataclass(kw_only=True)
class Config:
    action: str = setting(
        "train | plan (what would happen) | check (some steps against one plain process: do the guarantees hold?) | "
        "generate (text, with resume=RUN) | evaluate (how good is it on unseen data, with resume=RUN)",
        "train",
    )
    input: str | None = setting("action=generate: a file of lines; null = what comes on stdin", None)
    weights: str = setting("action=generate, evaluate: the newest checkpoint | best (lowest loss/val)", "newest")
    name: str = setting("name of the run: the folder under runs/", "???")
    model: ModelConfig = setting("the model and its size", "???")
    data: DataConfig = setting("the data", "???")
    devices: Any = setting("4 | auto | cpu | cpu:4 | cuda:1 | [0,1] | [cuda:0,cuda:1]", "auto")
    partitions: Any = setting(
        "number of stages | null (one for each device; for interleaved, looped_bfs and zb_v two; for ouroboros one "
        "more than devices) | auto (one or several for each, whatever is fastest)",
        None,
    )
    balance: Any = setting(
        "layers of each stage: auto (the slowest stage is fastest) | least_variance (GPipe's criterion), where layers "
        "are measured first | even | a list such as [2,3,3]",
        AUTO,
    )
    data_parallel: Any = setting(
        "replicas of the pipeline, which share each mini-batch and the devices | auto (whatever is fastest)", 1
    )
    batch_size: int = setting("samples in one mini-batch, of all replicas", 16)
    micro_batches: Any = setting(
        "pieces of a mini-batch, of all replicas | null (min(16, batch_size), of amoebanet a quarter; one for "
        "ouroboros and pipedream) | auto (whatever is fastest)",
        None,
    )
    schedule: str = setting(
        "order of the pipeline's work: "
        + " | ".join(SCHEDULES)
        + " | auto (whatever is fastest) | the path of a .csv file; stale, nobody waits: "
        + " | ".join(STALE),
        "gpipe",
    )
    recompute: Any = setting(
        "run each forward again before its backward, to save memory: "
        + " | ".join(POLICIES)
        + " (recompute_layers) | auto (whatever is fastest and fits) | a list, one for each stage",
        "always",
    )
    recompute_layers: list[str] | None = setting(
        "recompute=selective: the layers to run again, by name or pattern, such as ['blocks.*']", None
    )
    threads: Any = setting("CPU threads of each worker; auto = cores / workers of this machine", 1)
    precision: str = setting("fp32 | bf16 (autocast) | fp64 (the whole model, for comparisons)", "fp32")
    messages: str = setting(
        "what travels between devices: exact | bf16 (half the bytes of fp32; numbers then depend on the cut)", "exact"
    )
    seed: int = setting("where all randomness starts", 0)
    steps: int | None = setting("train up to this step; give steps or epochs", None)
    epochs: int | None = setting("train for so many passes over the data", None)
    logit_clip: float | None = setting("bound of the softmax pre-activations; null = off", None)
    logit_clip_kind: str = setting(
        "hard (clamp, in training only) | soft (cap * tanh(x / cap), part of the model)", "hard"
    )
    grad_clip: float | None = setting("largest global gradient norm; null = off", 1.0)
    optimizer: OptimizerConfig = setting("the optimizer", "???")
    lr_rule: LrRuleConfig = setting("the learning rate's course over the steps", "???")
    ema: float | None = setting(
        "decay of a moving average of the weights, which evaluation sees; 0.9999 is common, null = off", None
    )
    log_every: int = setting("steps between two lines of the log", 10)
    trace_every: int = setting(
        "steps between two that are drawn beside their simulation, into trace/ of the run folder; 0 = none", 0
    )
    eval: EvalConfig = field(default_factory=EvalConfig, metadata={"help": "evaluation"})
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata={"help": "checkpoints"})
    stale: StaleConfig = field(default_factory=StaleConfig, metadata={"help": "stale schedules"})
    check: CheckConfig = field(default_factory=CheckConfig, metadata={"help": "comparison"})
    plan: PlanConfig = field(default_factory=PlanConfig, metadata={"help": "planning"})
    generate: GenerateConfig = field(default_factory=GenerateConfig, metadata={"help": "generation"})
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig, metadata={"help": "evaluation of a run"})
    init_from: str | None = setting("a run folder whose weights this run starts from, where names and shapes fit", None)
    resume: str | None = setting("a run folder to go on with", None)


def to_json(cfg: Config) -> str:
    """The settings as JSON text: what is handed to the workers and kept in checkpoints."""
    return json.dumps(dataclasses.asdict(cfg))


def from_json(text: str) -> Config:
    """The inverse of `to_json`."""
    raw = json.loads(text)
    for group, schemas in SCHEMAS.items():
        raw[group] = schemas[raw[group]["name"]](**raw[group])
    raw["lr_rule"] = LrRuleConfig(**raw["lr_rule"])
    raw["eval"] = EvalConfig(**raw["eval"])
    raw["checkpoint"] = CheckpointConfig(**raw["checkpoint"])
    raw["stale"] = StaleConfig(**raw["stale"])
    raw["check"] = CheckConfig(**raw["check"])
    raw["plan"] = PlanConfig(**raw["plan"])
    raw["generate"] = GenerateConfig(**raw.get("generate", {}))
    raw["evaluate"] = EvaluateConfig(**raw.get("evaluate", {}))
    if raw["plan"].device is not None:
        raw["plan"].device = DeviceConfig(**raw["plan"].device)
    return Config(**raw)


__all__ = [
    "AUTO",
    "BALANCES",
    "PLANNED",
    "SCHEMAS",
    "AdafactorConfig",
    "AdamConfig",
    "AmoebaNetConfig",
    "AnythingConfig",
    "CheckConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DeviceConfig",
    "EvalConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "ImagesConfig",
    "LrRuleConfig",
    "ModelConfig",
    "MuonConfig",
    "NadamConfig",
    "OptimizerConfig",
    "PlanConfig",
    "RmspropConfig",
    "RotatedAdamConfig",
    "Seq2SeqConfig",
    "SgdConfig",
    "StaleConfig",
    "SyntheticConfig",
    "TextConfig",
    "TransformerConfig",
    "TransformerXLConfig",
    "TranslationConfig",
    "from_json",
    "setting",
    "to_json",
]
