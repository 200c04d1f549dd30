"""Measures when the actions of a step ran, without making a GPU wait."""

import time

import torch

from pipetrain.schedule import Action, Span


class CpuClock:
    """Wall time: on a CPU an action has ended when its call returns."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Makes now second zero and forgets all spans."""
        self._zero = time.perf_counter()
        self._spans: list[Span] = []

    def now(self) -> float:
        return time.perf_counter() - self._zero

    def record(self, action: Action, start: float) -> None:
        """Notes that `action` ran from `start` (a value of `now`) until this moment."""
        self._spans.append(Span(action, start, self.now()))

    def spans(self) -> list[Span]:
        return self._spans


class CudaClock:
    """Events on the compute stream, read once the step is over."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._zero = self.now()
        self._events: list[tuple[Action, torch.cuda.Event, torch.cuda.Event]] = []

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def record(self, action: Action, start: torch.cuda.Event) -> None:
        self._events.append((action, start, self.now()))

    def spans(self) -> list[Span]:
        if self._events:
            self._events[-1][2].synchronize()
        return [
            Span(action, self._zero.elapsed_time(start) / 1000, self._zero.elapsed_time(end) / 1000)
            for action, start, end in self._events
        ]


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock() if device.type == "cuda" else CpuClock()
