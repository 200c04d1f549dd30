"""The rules about each kind of data. Each function adds a line for every rule that is broken."""

from pipetrain.config import Config, ImagesConfig, SyntheticConfig, TextConfig, TranslationConfig
from pipetrain.rules.words import shown
from pipetrain.suggest import one_of

IMAGE_SETS = ("digits", "fashion_mnist", "cifar10", "cifar100", "folder")
AUGMENTATIONS = ("crop", "flip", "erase", "trivial")
ON_ERROR = ("fail", "skip")
DIRECTIONS = ("into", "from", "both")


def check_text(cfg: Config, problems: list[str]) -> None:
    if isinstance(cfg.data, TextConfig):
        data = cfg.data
        fractions = (data.valid_fraction, data.test_fraction)
        if min(fractions) < 0 or sum(fractions) >= 1:
            problems.append(
                f"data.valid_fraction={fractions[0]} and data.test_fraction={fractions[1]} must be at least 0 "
                "and leave something to train on; 0.05 each is common"
            )
        if data.tokenizer == "sentencepiece" and data.vocab_size is None:
            problems.append("data.tokenizer=sentencepiece needs data.vocab_size; try data.vocab_size=8000")
        if data.tokenizer not in ("sentencepiece", "words") and data.vocab_size is not None:
            problems.append(
                f"data.vocab_size={data.vocab_size} is only for data.tokenizer=sentencepiece and words; "
                f"data.tokenizer={data.tokenizer} brings its own vocabulary"
            )


def check_translation(cfg: Config, problems: list[str]) -> None:
    data = cfg.data
    if not isinstance(data, TranslationConfig):
        return
    if data.direction not in DIRECTIONS:
        problems.append(f"data.direction={data.direction}: no such choice. {one_of(data.direction, DIRECTIONS)}")
    fractions = (data.valid_fraction, data.test_fraction)
    if min(fractions) < 0 or sum(fractions) >= 1:
        problems.append(
            f"data.valid_fraction={fractions[0]} and data.test_fraction={fractions[1]} must be at least 0 and leave "
            "something to train on; 0.02 each is common"
        )
    if not 0 <= data.sampling <= 1:
        problems.append(
            f"data.sampling={data.sampling} must be at least 0 (all languages alike) and at most 1 (as they are)"
        )
    for key, value, least in (("max_tokens", data.max_tokens, 4), ("vocab_size", data.vocab_size, 1)):
        if value < least:
            problems.append(f"data.{key}={value} must be at least {least}")
    if data.languages is not None and (not data.languages or data.pivot in data.languages):
        problems.append(
            f"data.languages={shown(data.languages)} must name languages that data.pivot={data.pivot} is paired with; "
            "leave it out for all of them"
        )


def check_synthetic(cfg: Config, problems: list[str]) -> None:
    if isinstance(cfg.data, SyntheticConfig) and not cfg.data.shape:
        problems.append("data.shape=[] must have at least one size, such as data.shape=[3,64,64]")


def check_images(cfg: Config, problems: list[str]) -> None:
    data = cfg.data
    if not isinstance(data, ImagesConfig):
        return
    choices = [("set", data.set, IMAGE_SETS), ("on_error", data.on_error, ON_ERROR)]
    choices += [("augment", name, AUGMENTATIONS) for name in data.augment or ()]
    for key, value, allowed in choices:
        if value not in allowed:
            problems.append(f"data.{key}={value}: no such choice. {one_of(str(value), allowed)}")
    if data.set in IMAGE_SETS[1:] and not data.path:
        problems.append(f"data.set={data.set} needs data.path, the folder that holds it")
    if data.set == "digits" and data.path:
        problems.append(f"data.path={data.path} means nothing to data.set=digits; for your images: data.set=folder")
    if data.channels not in (None, 1, 3):
        problems.append(f"data.channels={data.channels} must be 1 (grey), 3 (colour) or null (the set's own)")
    if not 0 <= data.valid_fraction < 1:
        problems.append(f"data.valid_fraction={data.valid_fraction} must be at least 0 and below 1; 0.1 is common")
    if data.on_error == "skip" and data.set != "folder":
        problems.append("data.on_error=skip is for single files, those of data.set=folder; leave it out")
