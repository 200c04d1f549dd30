"""What the launcher hands to the workers: settings and facts, as JSON text."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from pipetrain import config
from pipetrain.config import Config
from pipetrain.data.text import TokenFolder
from pipetrain.paths import RunPaths


@dataclass(frozen=True)
class Job:
    """One run, ready to start.

    Attributes:
        cfg: the checked settings.
        run: the run folder.
        tokens: the prepared text, or None if the data is no text.
        devices: one name for each rank.
        checkpoint: the verified checkpoint to go on from, or None.
        record: keep all numbers of every step for a comparison, and print nothing.
    """

    cfg: Config
    run: RunPaths
    tokens: TokenFolder | None
    devices: tuple[str, ...]
    checkpoint: Path | None
    record: bool = False

    @property
    def data_id(self) -> str:
        """Changes whenever the text, its split or its tokenizer changes."""
        return Path(self.tokens.folder).name if self.tokens is not None else self.cfg.data.name

    def to_json(self) -> str:
        """The job as text, for another process."""
        return json.dumps(
            {
                "cfg": config.to_json(self.cfg),
                "run": str(self.run.root),
                "tokens": dataclasses.asdict(self.tokens) if self.tokens is not None else None,
                "devices": self.devices,
                "checkpoint": str(self.checkpoint) if self.checkpoint else None,
                "record": self.record,
            }
        )

    @staticmethod
    def from_json(text: str) -> "Job":
        """The inverse of `to_json`."""
        raw = json.loads(text)
        return Job(
            cfg=config.from_json(raw["cfg"]),
            run=RunPaths(Path(raw["run"])),
            tokens=TokenFolder(**raw["tokens"]) if raw["tokens"] is not None else None,
            devices=tuple(raw["devices"]),
            checkpoint=Path(raw["checkpoint"]) if raw["checkpoint"] else None,
            record=raw["record"],
        )
