"""What can be chosen as a whole, each with its own settings: models, data and optimizers. The rest is in `config`.

No torch here, as there.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


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
class Seq2SeqConfig(ModelConfig):
    name: str = setting("encoder-decoder Transformer for translation, sized as GPipe's T(L, H, A)", "seq2seq")
    layers: int = setting("L: blocks of the encoder, and as many of the decoder", 3)
    d_model: int = setting("width of the residual stream", 256)
    d_ff: int = setting("H: width inside the feed-forward layers", 1024)
    heads: int = setting("A: attention heads", 4)
    head_width: int = setting("channels of an attention head", 64)
    dropout: float = setting("probability of dropping an activation, 0 to below 1", 0.1)
    embeddings: str = setting(
        "all (one matrix for source, target and output) | output (one for target and output) | none (three)", "all"
    )
    norm: str = setting("norms: pre (before attention and feed-forward) | post (behind the sums)", "pre")
    init_scale: str = setting(
        "factor of the initial feed-forward weights, L blocks: none | inverse_depth (1/L) | inverse_sqrt_depth", "none"
    )
    label_smoothing: float = setting("share of a target that is spread over all words, 0 to below 1", 0.1)


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
class TranslationConfig(DataConfig):
    name: str = setting("pairs of sentences in one or many languages", "translation")
    path: str | None = setting(
        "a folder of aligned line files (train.en-de.de, train.en-de.en), tables (de.tsv) or gettext catalogues, or "
        "one such file; null = Django's messages in 97 languages",
        None,
    )
    languages: list[str] | None = setting("the languages that are wanted, such as [de,nl]; null = all", None)
    pivot: str = setting("the language that all others are paired with", "en")
    direction: str = setting("translate into the pivot | from it | both", "into")
    tokenizer: str = setting(
        "sentencepiece (one vocabulary of all languages, trained on them once) | tokenizer.model of an earlier run",
        "sentencepiece",
    )
    vocab_size: int = setting("pieces of the vocabulary that is trained", 8000)
    max_tokens: int = setting("longest sentence; a mini-batch has batch_size such ones, or more shorter ones", 64)
    sampling: float = setting("languages with n pairs are seen in proportion to n to this power; 1 = as they are", 0.7)
    valid_fraction: float = setting("share held out for validation, where there is no such file", 0.02)
    test_fraction: float = setting("share held out for testing, where there is no such file", 0.02)
    cache_dir: str = setting("where token files are kept", "~/.cache/pipetrain")


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


# Which schema a group's `name` stands for. Used by `cli` (typed composition) and by `from_json`.
SCHEMAS: dict[str, dict[str, type]] = {
    "model": {
        "transformer": TransformerConfig,
        "transformer_xl": TransformerXLConfig,
        "seq2seq": Seq2SeqConfig,
        "amoebanet": AmoebaNetConfig,
        "anything": AnythingConfig,
    },
    "data": {
        "text": TextConfig,
        "synthetic": SyntheticConfig,
        "images": ImagesConfig,
        "translation": TranslationConfig,
    },
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
