"""The plan of a run: what is printed before the first step and kept in `plan.json`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipetrain.costs import StageCost
from pipetrain.models import Recipe
from pipetrain.schedule import Kind, Schedule, bubble_fraction, grid
from pipetrain.sim.simulate import simulate

_WIDEST_GRID = 110
_MOST_ROWS = 32  # stages in a table
_LONGEST_LIST = 16  # stages of another plan
_MOST_SHOWN = 4  # of the plans behind the best one


@dataclass(frozen=True)
class StagePlan:
    """One stage before it runs."""

    stage: int
    rank: int
    device: str
    layers: list[str]
    parameters: int


@dataclass(frozen=True)
class StagePrediction:
    """What the planner says of one stage.

    Attributes:
        forward_s, backward_s: of one micro-batch.
        idle_s: of its rank in a step.
        memory: bytes by kind in the fullest moment of its rank, see `sim.memory.Memory`.
    """

    forward_s: float
    backward_s: float
    idle_s: float
    memory: dict[str, int]


@dataclass(frozen=True)
class Weighed:
    """A plan that the planner looked at.

    Attributes:
        settings: what to type for it.
        device_bytes: in the fullest moment of its fullest device.
        fits: whether all devices have as much.
    """

    settings: dict[str, Any]
    step_s: float
    bubble_fraction: float
    device_bytes: int
    fits: bool


@dataclass(frozen=True)
class Prediction:
    """What the planner says of a step, from what each layer costs.

    Attributes:
        process_bytes: what a process takes before it has a stage.
        device_bytes: of each device in its fullest moment, with what the process itself takes.
        accounts: where the seconds of a step go, see `sim.accounts.Accounts`.
        tokens_per_s: of text, else None.
        chosen: the settings that were left to the planner.
        weighed: this plan and others, the best first.
    """

    step_s: float
    bubble_fraction: float
    stages: list[StagePrediction]
    process_bytes: int
    device_bytes: list[int]
    accounts: dict[str, float]
    samples_per_s: float
    tokens_per_s: float | None
    warnings: list[str]
    chosen: list[str]
    weighed: list[Weighed]

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> "Prediction":
        """The inverse of `dataclasses.asdict`."""
        stages = [StagePrediction(**each) for each in raw["stages"]]
        return Prediction(**raw | {"stages": stages, "weighed": [Weighed(**each) for each in raw["weighed"]]})

    def reasons(self) -> list[str]:
        """Lines for the console: what other choices would cost, each with all else as good as it can be then."""
        best = self.weighed[0]
        rows = []
        for key in self.chosen:
            others: dict[str, str] = {}
            for plan in self.weighed[1:]:
                value = str(plan.settings[key])
                if key != "balance" and plan.settings[key] != best.settings[key] and value not in others:
                    others[value] = f"{value} {_compared(plan, best)}"
            if others:
                rows.append((f"  {key}", ", ".join(others.values())))
        if not rows:
            return []
        width = max(len(key) for key, _ in rows)
        return [
            "what other choices would cost, with all else as good as it can be then:",
            *(f"{key.ljust(width)}  {text}" for key, text in rows),
        ]

    def next_best(self) -> list[str]:
        """Lines for the console: the plans behind this one."""
        best, *others = (plan for plan in self.weighed if plan.fits)
        if not others:
            return []
        keys = [key for key in best.settings if any(plan.settings[key] != best.settings[key] for plan in others)]
        rows = [
            (
                f"  {_compared(plan, best)}",
                f"waiting {plan.bubble_fraction:.1%}",
                f"{mib(plan.device_bytes)} on the fullest device",
                " ".join(f"{key}={_shown(plan.settings[key])}" for key in keys),
            )
            for plan in others[:_MOST_SHOWN]
        ]
        return ["the next best:", *aligned(rows)]


def _compared(plan: Weighed, best: Weighed) -> str:
    return f"{plan.step_s / best.step_s:.2f}x" if plan.fits else f"needs {mib(plan.device_bytes)}"


def _shown(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    shown = [*value[:3], "...", value[-1]] if len(value) > _LONGEST_LIST else value
    return f"[{','.join(map(str, shown))}]"


@dataclass(frozen=True)
class Plan:
    """Who computes what, and how busy everybody would be if all stages cost the same, or as measured.

    Attributes:
        num_microbatches: of each replica.
        bubble_fraction: with equal stages.
        prediction: where layers were measured.
        replicas: pipelines that share each mini-batch; the stages are those of the first one.
    """

    stages: list[StagePlan]
    schedule: str
    num_microbatches: int
    recompute: str | list[str]
    bubble_fraction: float
    prediction: Prediction | None = None
    replicas: int = 1

    @property
    def balance(self) -> list[int]:
        return [len(stage.layers) for stage in self.stages]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "balance": self.balance}, indent=2)

    def table(self) -> list[str]:
        """Lines for the console: a row a stage, then the schedule in a sentence."""
        several = len({stage.rank for stage in self.stages}) < len(self.stages)
        titles = ("forward", "backward", "idle a step", "memory") if self.prediction is not None else ()
        rows = [("stage", *(["rank"] if several else []), "device", "layers", "", "parameters", *titles)]
        for stage in self.stages:
            first, last = stage.layers[0], stage.layers[-1]
            span = first if first == last else f"{first} .. {last}"
            home = [str(stage.rank)] if several else []
            known = (str(stage.stage), *home, stage.device, str(len(stage.layers)), span, f"{stage.parameters:,}")
            rows.append((*known, *self._predicted(stage.stage)))
        lines = aligned(_without_middle(rows))
        total = sum(stage.parameters for stage in self.stages)
        number = f"{self.num_microbatches} micro-batches"
        if self.replicas > 1:
            number = f"{self.num_microbatches * self.replicas} micro-batches, shared by {self.replicas} replicas"
        lines.append(
            f"{total:,} parameters, schedule {self.schedule}, {number}, "
            f"recompute {self.recompute if isinstance(self.recompute, str) else ', '.join(self.recompute)}"
        )
        if self.prediction is not None:
            said = self.prediction
            speed = (
                f"{said.samples_per_s:,.3g} samples"
                if said.tokens_per_s is None
                else f"{said.tokens_per_s:,.0f} tokens"
            )
            idle = f"a device waits {said.bubble_fraction:.1%} of the time"
            lines.append(f"predicted: {short(said.step_s)} a step, {speed} a second; {idle}")
            lines += [f"warning: {text}" for text in said.warnings]
            lines += [*said.reasons(), *said.next_best()]
        elif len(self.stages) > 1:
            lines.append(f"with equal stages each would wait {self.bubble_fraction:.1%} of the time (the bubble)")
        return lines

    def memory_table(self) -> list[str]:
        """Lines for the console: a row a stage, with the bytes of each kind that there are any of."""
        if self.prediction is None:
            return []
        of_stages = [stage.memory for stage in self.prediction.stages]
        kinds = [kind for kind in of_stages[0] if any(memory[kind] for memory in of_stages)]
        rows = [("stage", *(kind.replace("_", " ") for kind in kinds), "memory")]
        for stage, memory in enumerate(of_stages):
            rows.append((str(stage), *(mib(memory[kind]) for kind in kinds), mib(sum(memory.values()))))
        process_bytes = self.prediction.process_bytes
        beside = [f"beside that each process takes {mib(process_bytes)}"] if process_bytes else []
        return [*aligned(_without_middle(rows)), *beside]

    def _predicted(self, stage: int) -> tuple[str, ...]:
        if self.prediction is None:
            return ()
        its = self.prediction.stages[stage]
        return short(its.forward_s), short(its.backward_s), short(its.idle_s), mib(sum(its.memory.values()))


def _without_middle(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The title and as many rows as a screen has."""
    if len(rows) <= 1 + _MOST_ROWS:
        return rows
    half = _MOST_ROWS // 2
    return [*rows[: 1 + half], ("...", *[""] * (len(rows[0]) - 1)), *rows[-half:]]


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def mib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**20:,.{1 if num_bytes < 10 * 2**20 else 0}f} MiB"


def short(seconds: float) -> str:
    """Seconds for people.

    >>> short(0.01234), short(1.5)
    ('12.3 ms', '1.5 s')
    """
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def make_plan(
    schedule: Schedule,
    devices: Sequence[str],
    recipe: Recipe,
    balance: Sequence[int],
    parameters: Sequence[int],
    recompute: str | list[str],
    prediction: Prediction | None = None,
) -> Plan:
    """Puts the plan together from the schedule, the layers and the parameters of every stage.

    Args:
        devices: of all replicas.
    """
    names = [layer.name for layer in recipe.layers]
    halves = (1.0, 1.0) if schedule.is_split else (2.0, 0.0)
    cost = StageCost(1.0, *halves, recompute_s=1.0)
    stages = [
        StagePlan(s, rank, devices[rank], names[sum(balance[:s]) : sum(balance[: s + 1])], parameters[s])
        for s, rank in enumerate(schedule.placement)
    ]
    return Plan(
        stages=stages,
        schedule=schedule.name,
        num_microbatches=schedule.num_microbatches,
        recompute=recompute,
        replicas=len(devices) // schedule.num_ranks,
        bubble_fraction=bubble_fraction(simulate(schedule, [cost] * schedule.num_stages), schedule.num_ranks),
        prediction=prediction,
    )


def drawn(schedule: Schedule) -> list[str]:
    """The lines of the schedule's grid, where it fits a terminal and there is something to see."""
    lines = grid(schedule).splitlines()
    if schedule.num_stages == 1:
        return []
    if max(map(len, lines)) > _WIDEST_GRID:
        return ["the schedule is too wide for text; action=plan makes a picture of it"]
    backward = "I and W the halves of a backward" if schedule.is_split else "B backward"
    redone = "R recompute, " if any(action.kind is Kind.RECOMPUTE for action in schedule) else ""
    return [*lines, f"F forward, {redone}{backward}, - still at it, . waiting; a column is the time of a forward"]
