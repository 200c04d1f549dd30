"""Every setting of pipetrain with its default and its meaning.

The dataclasses are the schema: Hydra fills them from YAML files and the command line (see `cli`), and `help` is what
`pipetrain --help` prints. What values they may have is in `rules`.

No torch here: `--help` and tab completion must stay fast.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from pipetrain.schedule import POLICIES, SCHEDULES, STALE

AUTO = "auto"
# What AUTO leaves to the planner.
PLANNED = ("data_parallel", "schedule", "micro_batches", "recompute", "partitions", "balance")
BALANCES = (AUTO, "even", "least_variance")  # the rules; the others are lists


def setting(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with the sentence that `--help` prints for it."""
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class ModelConfig:
    name: str = setting("which model: the name of a builder in pipetrain.models", "???")


@dataclass(kw_only=True)
class TransformerConfig(ModelConfig):
    name: str = setting("decoder-only Transformer language model", "transformer")
    layers: int = setting("number of Transformer blocks", 6)
    d_model: int = setting("width of the residual stream", 256)
    d_ff: int = setting("width inside the feed-forward layers", 1024)
    heads: int = setting("attention heads; must divide d_model", 4)
    dropout: float = setting("probability of dropping an activation, 0 to below 1", 0.1)
    tied: bool = setting("one matrix for the input embedding and the output layer", False)
    positions: str = setting("learned | sinusoidal (no parameters)", "learned")
    init_scale: str = setting(
        "scale the initial feed-forward weights by depth: none | inverse_depth | inverse_sqrt_depth", "none"
    )


@dataclass(kw_only=True)
class TransformerXLConfig(ModelConfig):
    name: str = setting("language model with memory and relative positions (Transformer-XL)", "transformer_xl")
    layers: int = setting("number of Transformer blocks", 6)
    d_model: int = setting("width of the residual stream", 256)
    d_ff: int = setting("width inside the feed-forward layers", 1024)
    heads: int = setting("attention heads; must divide d_model", 4)
    dropout: float = setting("probability of dropping an activation, 0 to below 1", 0.1)
    attention_dropout: float = setting("probability of dropping an attention weight, 0 to below 1", 0.0)
    memory: int = setting("tokens before a sample that attention sees in training", 128)
    evaluation_memory: int | None = setting("the same in evaluation; null = as many", None)
    tied: bool = setting("one matrix for the input embedding and the output layer", True)
    shared_biases: bool = setting("one pair of attention biases for all blocks; stale schedules need false", False)
    cutoffs: list[int] = field(
        default_factory=list,
        metadata={
            "help": "adaptive softmax: ends of the groups of words, most frequent first, such as [20000,40000]; [] = "
            "one softmax over all"
        },
    )


@dataclass(kw_only=True)
class AmoebaNetConfig(ModelConfig):
    name: str = setting("AmoebaNet image classifier, sized by (layers, filters) as GPipe's (L, D)", "amoebanet")
    genotype: str = setting("which cells: D | B", "D")
    layers: int = setting("number of normal cells, in three stacks; must be divisible by 3", 6)
    filters: int = setting("filters of the first stack; each stack has twice as many as the one before", 32)
    num_classes: int | None = setting("outputs of the classifier; null = the classes of the data", None)
    stem: str = setting("imagenet (a 32nd as wide in the end) | small (a quarter; for some 28 to 64 pixels)", "small")
    dropout: float = setting("probability of dropping an input of the classifier, 0 to below 1", 0.5)
    drop_path: float = setting("probability of dropping a path of the last cell, less in earlier ones", 0.0)
    drop_path_steps: int = setting("steps over which drop_path grows from 0; 0 = none", 0)
    aux_weight: float = setting("weight of the auxiliary head's loss; 0 = no such head", 0.4)
    label_smoothing: float = setting("share of a target that is spread over all classes, 0 to below 1", 0.1)
    bn_momentum: float = setting("share of a mini-batch in BatchNorm's running statistics", 0.1)
    bn_eps: float = setting("added to the variance in BatchNorm", 1e-5)


@dataclass(kw_only=True)
class AnythingConfig(ModelConfig):
    name: str = setting("any PyTorch module, cut into layers by itself", "anything")
    factory: str = setting("package.module:function that gives the module, or a classifier of torchvision", "")
    arguments: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "keyword arguments of the factory, such as {width: 64}"}
    )
    loss: str = setting("cross_entropy | mse | package.module:function(output, targets) -> sum", "cross_entropy")


@dataclass(kw_only=True)
class DataConfig:
    name: str = setting("which kind of data: the name of a reader in pipetrain.data", "???")


@dataclass(kw_only=True)
class TextConfig(DataConfig):
    name: str = setting("plain text for language models", "text")
    path: str | None = setting(
        "a text file, or a folder of .txt files (train/valid/test files are used as such); null = Python's manual", None
    )
    tokenizer: str = setting(
        "bytes | words (what lies between spaces) | sentencepiece (trained on the text, once) | path of such a model",
        "bytes",
    )
    vocab_size: int | None = setting(
        "pieces of tokenizer=sentencepiece, or the most frequent words; null = all words", None
    )
    seq_len: int = setting("tokens in one sample", 128)
    order: str = setting("shuffled (random windows) | contiguous (each row reads on where it stopped)", "shuffled")
    valid_fraction: float = setting("share of a single text held out for validation", 0.05)
    test_fraction: float = setting("share of a single text held out for testing", 0.05)
    cache_dir: str = setting("where token files and trained tokenizers are kept", "~/.cache/pipetrain")


@dataclass(kw_only=True)
class SyntheticConfig(DataConfig):
    name: str = setting("random samples of some classes, made as they are needed", "synthetic")
    shape: list[int] = field(default_factory=lambda: [3, 224, 224], metadata={"help": "sizes of one sample"})
    classes: int = setting("classes to tell apart", 10)
    samples: int = setting("training samples; a tenth as many are for validation", 1000)


@dataclass(kw_only=True)
class ImagesConfig(DataConfig):
    name: str = setting("images with class labels", "images")
    set: str = setting(
        "digits (brought by scikit-learn) | fashion_mnist | cifar10 | cifar100 | folder (one of images for each class)",
        "digits",
    )
    path: str | None = setting("the folder that holds the set; a folder of classes may have train/ and val/", None)
    size: int | None = setting("side of the square images that the model gets; null = the set's own", None)
    channels: int | None = setting("1 (grey) | 3 (colour) | null = the set's own", None)
    augment: list[str] | None = setting(
        "what training images go through: any of [crop,flip,erase,trivial]; null = what suits the set", None
    )
    workers: int = setting("processes that read images ahead of the first stage; 0 = it reads them itself", 1)
    on_error: str = setting("an image file that cannot be read: fail | skip (all are read once at the start)", "fail")
    valid_fraction: float = setting("share held out for validation where the set has no images for it", 0.1)
    cache_dir: str = setting("where the lists of a folder's images are kept", "~/.cache/pipetrain")


@dataclass(kw_only=True)
class OptimizerConfig:
    name: str = setting("adamw | adam | nadam | muon | rotated_adam | sgd | adafactor | rmsprop", "???")
    lr: float = setting("peak learning rate", 1e-3)
    weight_decay: float = setting("decay of matrices; vectors (biases, norms) are never decayed", 0.0)


@dataclass(kw_only=True)
class AdamConfig(OptimizerConfig):
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"help": "decay of the two moments"})
    eps: float = setting("added to the root of the second moment", 1e-8)


@dataclass(kw_only=True)
class NadamConfig(AdamConfig):
    momentum_decay: float = setting("how fast the momentum grows to its full size", 4e-3)


@dataclass(kw_only=True)
class MuonConfig(AdamConfig):
    momentum: float = setting("momentum of matrices; embedding, output layer and vectors get AdamW", 0.95)


@dataclass(kw_only=True)
class RotatedAdamConfig(AdamConfig):
    refresh: int = setting("updates between two turns of a matrix's basis", 10)
    largest: int = setting("longest side of a matrix that is turned", 1024)


@dataclass(kw_only=True)
class SgdConfig(OptimizerConfig):
    momentum: float = setting("momentum, 0 = none", 0.0)
    nesterov: bool = setting("Nesterov's form of momentum", False)


@dataclass(kw_only=True)
class AdafactorConfig(OptimizerConfig):
    beta2_decay: float = setting("exponent of the second moment's decay", -0.8)
    clip_threshold: float = setting("root mean square to which an update is clipped", 1.0)


@dataclass(kw_only=True)
class RmspropConfig(OptimizerConfig):
    decay: float = setting("decay of the second moment", 0.9)
    momentum: float = setting("momentum, 0 = none", 0.9)
    eps: float = setting("added to the root of the second moment", 0.1)


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
        "train | plan (what would happen) | check (some steps against one plain process: do the guarantees hold?)",
        "train",
    )
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
    init_from: str | None = setting("a run folder whose weights this run starts from, where names and shapes fit", None)
    resume: str | None = setting("a run folder to go on with", None)


# Which schema a group's `name` stands for. Used by `cli` (typed composition) and by `from_json`.
SCHEMAS: dict[str, dict[str, type]] = {
    "model": {
        "transformer": TransformerConfig,
        "transformer_xl": TransformerXLConfig,
        "amoebanet": AmoebaNetConfig,
        "anything": AnythingConfig,
    },
    "data": {"text": TextConfig, "synthetic": SyntheticConfig, "images": ImagesConfig},
    "optimizer": {
        "adamw": AdamConfig,
        "adam": AdamConfig,
        "nadam": NadamConfig,
        "muon": MuonConfig,
        "rotated_adam": RotatedAdamConfig,
        "sgd": SgdConfig,
        "adafactor": AdafactorConfig,
        "rmsprop": RmspropConfig,
    },
}


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
    if raw["plan"].device is not None:
        raw["plan"].device = DeviceConfig(**raw["plan"].device)
    return Config(**raw)
