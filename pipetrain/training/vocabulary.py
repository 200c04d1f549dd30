"""The vocabulary of a run: kept in its folder, so that the run makes text wherever it is, and told from other ones."""

import dataclasses
import hashlib
import json
from pathlib import Path

from pipetrain.config import Config
from pipetrain.data.finished import write_synced
from pipetrain.data.text import TokenFolder
from pipetrain.data.tokenizer import BYTES
from pipetrain.data.translation.prepare import PairFolder
from pipetrain.errors import CheckpointError
from pipetrain.paths import RunPaths
from pipetrain.training.data import Prepared, prepared_from


def tokenizer_id(prepared: Prepared | None) -> str | None:
    """Changes whenever the numbers of a text's tokens do; None where there is no text."""
    if not isinstance(prepared, TokenFolder | PairFolder):
        return None
    return BYTES if prepared.tokenizer == BYTES else _digest(Path(prepared.tokenizer))


def keep(run: RunPaths, prepared: Prepared | None) -> None:
    """Writes down what is known of the data, and the tokenizer."""
    if not isinstance(prepared, TokenFolder | PairFolder):
        return
    write_synced(run.data, json.dumps(dataclasses.asdict(prepared), indent=2).encode())
    if prepared.tokenizer != BYTES:
        write_synced(run.tokenizer, Path(prepared.tokenizer).read_bytes())


def kept(cfg: Config, run: RunPaths, saved_id: str | None) -> TokenFolder | PairFolder:
    """What a run's folder has of its data. The data themselves may be gone.

    Args:
        saved_id: of the tokenizer that the weights were trained with; None is not known.

    Raises:
        CheckpointError: if it has nothing, or a tokenizer that the weights were not trained with.
    """
    try:
        facts = prepared_from(cfg, json.loads(run.data.read_text()))
        assert isinstance(facts, TokenFolder | PairFolder)
        own_id = BYTES if isinstance(facts, TokenFolder) and facts.tokenizer == BYTES else _digest(run.tokenizer)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{run.root} lacks a data.json or tokenizer.model of its run ({error}); it gets them when it goes on: "
            f"pipetrain resume={run.root} steps=..."
        ) from error
    if saved_id not in (None, own_id):
        raise CheckpointError(
            f"{run.tokenizer} is not the tokenizer that this run was trained with: its tokens have other numbers. Put "
            "the old file back"
        )
    return facts


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
