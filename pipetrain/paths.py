"""Every file name of a run, in one place."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """The files of one run folder; `root` is its absolute path."""

    root: Path

    @property
    def log(self) -> Path:
        """What every rank logged."""
        return self.root / "pipetrain.log"

    @property
    def status(self) -> Path:
        """State, step, exit code, error and final metrics, as JSON."""
        return self.root / "status.json"

    @property
    def environment(self) -> Path:
        """Versions, machine and command line, as JSON."""
        return self.root / "env.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, each with `step`."""
        return self.root / "metrics.jsonl"

    @property
    def plan(self) -> Path:
        """Stages, layers and schedule of the run, as JSON."""
        return self.root / "plan.json"

    @property
    def data(self) -> Path:
        """What is known of the text that the run is trained on, as JSON."""
        return self.root / "data.json"

    @property
    def tokenizer(self) -> Path:
        """The sentencepiece model of the run, if it has one."""
        return self.root / "tokenizer.model"

    def evaluation(self, name: str) -> Path:
        """What `action=evaluate` found."""
        return self.root / "evaluation" / name

    @property
    def schedule_picture(self) -> Path:
        """The schedule as it would run if all stages cost the same."""
        return self.root / "schedule.svg"

    def trace(self, step: int) -> Path:
        """When each action of a step ran, for Chrome or Perfetto; a picture of it lies beside it."""
        return self.root / "trace" / f"step_{step}.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def overrides(self) -> Path:
        """The command line as Hydra keeps it."""
        return self.root / ".hydra" / "overrides.yaml"

    @property
    def lock(self) -> Path:
        """Held by the living process that writes this folder."""
        return self.root / ".lock"

    @property
    def scratch(self) -> Path:
        """What the processes of a living run need to find and to accuse each other; removed at its end."""
        return self.root / ".processes"

    @property
    def check(self) -> Path:
        """The runs that `action=check` compares; removed at its end."""
        return self.root / ".check"

    def recorded(self, step: int, rank: int) -> Path:
        """What a rank kept of a step for a comparison."""
        return self.root / "recorded" / f"step_{step}.rank_{rank}.safetensors"

    @property
    def store(self) -> Path:
        """Where local ranks leave their addresses for each other."""
        return self.scratch / "store"

    @property
    def profile(self) -> Path:
        """What the layers take, measured for the plan, as JSON."""
        return self.root / "profile.json"

    @property
    def measuring(self) -> Path:
        """The name of the layer that they are at."""
        return self.scratch / "measuring"

    def failure(self, rank: int) -> Path:
        """What a failing rank left behind, as JSON."""
        return self.scratch / f"failure.{rank}.json"

    def pid(self, rank: int) -> Path:
        """The process id of a local rank."""
        return self.scratch / f"pid.{rank}"
