"""What the launcher hands to the workers: settings and facts, as JSON text."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from pipetrain import config
from pipetrain.config import Config
from pipetrain.derived import num_ranks
from pipetrain.paths import RunPaths
from pipetrain.training.data import Prepared, fingerprint, prepared_from
from pipetrain.training.plan import Prediction


@dataclass(frozen=True)
class Job:
    """One run, ready to start.

    Attributes:
        cfg: the checked settings.
        run: the run folder.
        data: what was found out about the data, see `training.data`.
        devices: one name for each rank, of all replicas.
        checkpoint: the verified checkpoint to go on from, or None.
        start: the verified checkpoint of another run that gives the first weights, or None.
        prediction: what the planner says of a step, where it was asked.
        record: keep all numbers of every step for a comparison, and print nothing.
    """

    cfg: Config
    run: RunPaths
    data: Prepared | None
    devices: tuple[str, ...]
    checkpoint: Path | None
    start: Path | None = None
    record: bool = False
    prediction: Prediction | None = None

    @property
    def data_id(self) -> str:
        """Changes whenever the data do."""
        return fingerprint(self.cfg, self.data)

    @property
    def num_ranks(self) -> int:
        """Of each pipeline."""
        return num_ranks(self.cfg, len(self.devices))

    def place_of(self, rank: int, stage: int | None = None) -> str:
        """Where one of all ranks stands, in words.

        Args:
            stage: where it is known which of those of the rank.
        """
        replica, place = divmod(rank, self.num_ranks)
        copy = f", replica {replica}" if len(self.devices) > self.num_ranks else ""
        return f"stage {place if stage is None else stage} (rank {rank}{copy})"

    def to_json(self) -> str:
        """The job as text, for another process."""
        return json.dumps(
            {
                "cfg": config.to_json(self.cfg),
                "run": str(self.run.root),
                "data": dataclasses.asdict(self.data) if self.data is not None else None,
                "devices": self.devices,
                "checkpoint": str(self.checkpoint) if self.checkpoint else None,
                "start": str(self.start) if self.start else None,
                "record": self.record,
                "prediction": dataclasses.asdict(self.prediction) if self.prediction is not None else None,
            }
        )

    @staticmethod
    def from_json(text: str) -> "Job":
        """The inverse of `to_json`."""
        raw = json.loads(text)
        cfg = config.from_json(raw["cfg"])
        return Job(
            cfg=cfg,
            run=RunPaths(Path(raw["run"])),
            data=prepared_from(cfg, raw["data"]),
            devices=tuple(raw["devices"]),
            checkpoint=Path(raw["checkpoint"]) if raw["checkpoint"] else None,
            start=Path(raw["start"]) if raw["start"] else None,
            record=raw["record"],
            prediction=Prediction.from_dict(raw["prediction"]) if raw["prediction"] is not None else None,
        )
