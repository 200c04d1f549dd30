"""`action=generate`: one line to stdout for each line of the input; whatever else is said goes to stderr."""

import sys
from pathlib import Path

from pipetrain.config import Config, TranslationConfig
from pipetrain.data.text import TokenFolder
from pipetrain.data.translation.prepare import PairFolder
from pipetrain.errors import ConfigError, Exit
from pipetrain.inference import lines
from pipetrain.inference.gathered import find, gather
from pipetrain.inference.translator import Translator, target
from pipetrain.inference.writer import Writer
from pipetrain.paths import RunPaths
from pipetrain.training.vocabulary import kept


def generate(cfg: Config, root: Path) -> int:
    """Translates lines, or goes on with texts.

    Args:
        cfg: the settings, not checked yet.
        root: the run folder.

    Raises:
        PipetrainError: for everything that is wrong with the settings, the run or the input.
    """
    found = find(cfg, RunPaths(root.absolute()), _say)
    cfg = found.cfg
    if cfg.data.name not in ("text", "translation"):
        raise ConfigError(f"action=generate makes text, which this run with data={cfg.data.name} does not")
    facts = kept(cfg, found.run, found.manifest.tokenizer)
    into = _into(cfg, facts)
    blocks = lines.blocks(cfg.input)
    gathered = gather(found, facts)
    if gathered.recipe.generation is None:
        raise ConfigError(
            f"action=generate does not know how model={cfg.model.name} makes text token by token; "
            "model=transformer, transformer_xl and seq2seq do"
        )
    if isinstance(facts, PairFolder):
        make: Translator | Writer = Translator(found, gathered, facts, str(found.run.tokenizer), into)
    else:
        make = Writer(found, gathered, facts)
    for block in blocks:
        for line in make(block):
            lines.write(line)
        sys.stdout.flush()
    if isinstance(make, Translator) and make.cut:
        _say(f"{make.cut} of the lines were cut to the data.max_tokens of the run, which the model cannot exceed")
    return Exit.DONE


def _into(cfg: Config, facts: TokenFolder | PairFolder) -> str:
    """The language to translate into; empty for texts."""
    if isinstance(cfg.data, TranslationConfig) and isinstance(facts, PairFolder):
        return target(cfg.data.direction, facts, cfg.generate.into)
    if cfg.generate.into is not None:
        raise ConfigError(f"generate.into={cfg.generate.into} is for translations, not for texts: leave it out")
    return ""


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
