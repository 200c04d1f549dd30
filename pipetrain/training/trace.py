"""What one step looked like: its measured spans beside what the simulator says of the same schedule.

Written as a trace for Chrome or Perfetto and as a picture, next to each other in the run folder.
"""

from collections.abc import Sequence
from statistics import mean

import torch

from pipetrain.costs import StageCost
from pipetrain.engine.transport import Transport
from pipetrain.paths import RunPaths
from pipetrain.schedule import Kind, Schedule, Span
from pipetrain.schedule.picture import chrome_trace, svg
from pipetrain.sim.simulate import simulate


def start_together(transport: Transport) -> None:
    """Makes second zero the same moment on all ranks: a step whose spans are to be compared begins with a meeting."""
    transport.all_reduce(torch.zeros(1))


def gather_spans(schedule: Schedule, own: Sequence[Span], transport: Transport) -> list[Span]:
    """The spans of all ranks, on every rank; each gives its own."""
    place = {action: number for number, action in enumerate(schedule.compute())}
    times = torch.zeros(len(place), 2, dtype=torch.float64)
    for span in own:
        times[place[span.action]] = torch.tensor([span.start_s, span.end_s])
    times = transport.all_reduce(times)
    return [Span(action, *times[number].tolist()) for action, number in place.items()]


def mean_costs(spans: Sequence[Span], num_stages: int) -> list[StageCost]:
    """What each kind of action took on each stage, on average."""
    seconds: dict[tuple[int, Kind], list[float]] = {}
    for span in spans:
        seconds.setdefault((span.action.stage, span.action.kind), []).append(span.seconds)

    def of(stage: int, *kinds: Kind) -> float:
        return sum(mean(seconds[stage, kind]) for kind in kinds if (stage, kind) in seconds)

    return [
        StageCost(
            forward_s=of(s, Kind.FORWARD),
            backward_s=of(s, Kind.BACKWARD, Kind.BACKWARD_INPUT),
            backward_weight_s=of(s, Kind.BACKWARD_WEIGHT),
            recompute_s=of(s, Kind.RECOMPUTE),
            update_s=of(s, Kind.UPDATE),
        )
        for s in range(num_stages)
    ]


def write_trace(run: RunPaths, step: int, schedule: Schedule, spans: Sequence[Span]) -> None:
    """
    Args:
        step: whose spans these are; steps count from 1.
    """
    simulated = simulate(schedule, mean_costs(spans, schedule.num_stages))
    panels = {
        f"step {step}, {schedule.name}, measured: {_makespan_s(spans):.3g} s": spans,
        f"simulated with the measured means: {_makespan_s(simulated):.3g} s": simulated,
    }
    path = run.trace(step)
    path.parent.mkdir(exist_ok=True)
    path.write_text(chrome_trace(panels, schedule.placement))
    path.with_suffix(".svg").write_text(svg(panels, schedule.placement))


def _makespan_s(spans: Sequence[Span]) -> float:
    return max(span.end_s for span in spans) - min(span.start_s for span in spans)
