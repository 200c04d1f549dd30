"""`action=evaluate`: how good a run's model is on one split of its data; of translations also by BLEU and chrF."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import rich.console
import sentencepiece
from rich.table import Table

from pipetrain.config import Config, TranslationConfig
from pipetrain.data.text import TokenFolder
from pipetrain.data.translation.pairs import TEST, TRAIN, VALID
from pipetrain.data.translation.prepare import BOTH, INTO, PairFolder
from pipetrain.errors import ConfigError, Exit
from pipetrain.inference.gathered import Found, Gathered, find, gather
from pipetrain.inference.score import Score, bleu, chrf
from pipetrain.inference.translator import Translator, settings_of
from pipetrain.paths import RunPaths
from pipetrain.training.data import Prepared, fingerprint, group_in, open_data, part_of_batch, prepare_data, share_of
from pipetrain.training.evaluate import Evaluator, text_values

_UNLIMITED = 10_000  # columns where the output is no terminal


@dataclass(frozen=True)
class Row:
    """One language of a translation model.

    Attributes:
        way: from which language into which one.
        pairs: to train on.
        sentences: that were translated.
        nll: -log p of a token of the references.
        copied: the score of the sources themselves, as if they were translations.
    """

    way: str
    pairs: int
    sentences: int
    nll: float
    chrf: Score
    bleu: Score
    copied_chrf: Score
    copied_bleu: Score


def evaluate(cfg: Config, root: Path) -> int:
    """Prints what it finds and leaves it in the run folder.

    Args:
        cfg: the settings, not checked yet.
        root: the run folder.

    Raises:
        PipetrainError: for everything that is wrong with the settings, the run or the data.
    """
    found = find(cfg, RunPaths(root.absolute()), _say)
    cfg = found.cfg
    data = prepare_data(cfg, lambda text: None)
    if fingerprint(cfg, data) != found.manifest.data:
        raise ConfigError(
            "the data are not those that the run was trained on, so what it has learned by heart may be in their "
            "splits; put the old ones back, or say where they are: data.path=FOLDER"
        )
    split = _split(cfg, data)
    batches = open_data(cfg, data, split, share_of(cfg, 0))
    _make_folder(found.run)
    gathered = gather(found, data)
    part = partial(part_of_batch, cfg, found.device, first=True, last=True)
    evaluator = Evaluator(gathered.runtime, gathered.recipe, gathered.schedule, part)
    values, of_group, _ = evaluator.run(batches, None, group=group_in(batches))
    if isinstance(data, TokenFolder):
        values |= text_values(values["loss/val"], data, split)
    values = {name.replace("loss/val", "loss").removeprefix("val/"): value for name, value in values.items()}
    _say(f"step {found.manifest.step}, {split} split: " + "  ".join(f"{name} {v:.4f}" for name, v in values.items()))
    facts: dict[str, Any] = {"step": found.manifest.step, "split": split, "values": values}
    if isinstance(data, PairFolder):
        nll = {way: its["val/nll"] for way, its in of_group.items()}
        rows = sorted(_translated(found, gathered, data, split, nll), key=lambda row: -row.pairs)
        _print(rows, settings_of(cfg))
        facts |= {"search": settings_of(cfg), "languages": [dataclasses.asdict(row) for row in rows]}
    _keep(found.run.evaluation(f"{split}.json"), json.dumps(facts, indent=2))
    _say(f"written to {found.run.evaluation('')}")
    return Exit.DONE


def _split(cfg: Config, data: Prepared | None) -> str:
    """That of the settings, or the one for testing where there is one.

    Raises:
        ConfigError: if it is empty.
    """
    sizes = {VALID: 1, TEST: 0}
    if isinstance(data, TokenFolder):
        sizes = {split: data.num_tokens[split] for split in sizes}
    elif isinstance(data, PairFolder):
        sizes = {split: sum(counts[split] for counts in data.counts.values()) for split in sizes}
    split = cfg.evaluate.split or (TEST if sizes[TEST] else VALID)
    if not sizes[split]:
        others = [other for other in sizes if sizes[other]]
        remedy = f"; use evaluate.split={others[0]}" if others else ""
        raise ConfigError(f"the data of this run have no {split} split{remedy}")
    return split


def _make_folder(run: RunPaths) -> None:
    """Before anything is computed."""
    folder = run.evaluation("")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}, where the evaluation is left, cannot be written ({error.strerror}); copy the run to where you "
            "may write"
        ) from error


def _translated(
    found: Found, gathered: Gathered, pairs: PairFolder, split: str, nll: dict[str, float]
) -> Iterator[Row]:
    """Translates the split, one language after the other, and leaves the translations in the run folder."""
    data = found.cfg.data
    assert isinstance(data, TranslationConfig)
    processor = sentencepiece.SentencePieceProcessor(model_file=pairs.tokenizer)
    for language in pairs.counts:
        for is_into in (True, False) if data.direction == BOTH else (data.direction == INTO,):
            one, other = (language, pairs.pivot) if is_into else (pairs.pivot, language)
            number = pairs.counts[language][split]
            number = min(number, found.cfg.evaluate.sentences or number)
            if not number:
                continue
            sides = (pairs.side(language, split, pivot=not is_into), pairs.side(language, split, pivot=is_into))
            sources, references = ([processor.decode(side[i].tolist()) for i in range(number)] for side in sides)
            translations = Translator(found, gathered, pairs, pairs.tokenizer, other)(sources)
            rows = zip(sources, references, translations, strict=True)
            lines = ("\t".join(text.replace("\t", " ") for text in row) for row in rows)
            _keep(found.run.evaluation(f"{split}.{one}-{other}.tsv"), "\n".join(lines) + "\n")
            yield Row(
                way=f"{one}-{other}",
                pairs=pairs.counts[language][TRAIN],
                sentences=number,
                nll=nll[f"{one}-{other}"],
                chrf=chrf(translations, references),
                bleu=bleu(translations, references, other),
                copied_chrf=chrf(sources, references),
                copied_bleu=bleu(sources, references, other),
            )


def _print(rows: Sequence[Row], search: str) -> None:
    heads = ("languages", "pairs", "sentences", "NLL", "chrF", "BLEU", "chrF of the source", "BLEU of the source")
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        scores = (row.chrf, row.bleu, row.copied_chrf, row.copied_bleu)
        shown = (f"{score.value:.1f} ± {score.plus_minus:.1f}" for score in scores)
        table.add_row(row.way, f"{row.pairs:,}", f"{row.sentences:,}", f"{row.nll:.3f}", *shown)
    console = rich.console.Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _UNLIMITED
    console.print(table)
    _say(f"{search}; ± is half of the 95 % confidence interval")
    for signature in dict.fromkeys(score.signature for row in rows for score in (row.chrf, row.bleu)):
        _say(signature)


def _keep(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
