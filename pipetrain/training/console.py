"""What a run shows on the terminal: a progress bar, or plain lines where the output is no terminal."""

import logging
import time
from collections.abc import Mapping

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_log = logging.getLogger(__name__)


class Console:
    """Progress of the steps, and the values that people watch under their metric names."""

    def __init__(self, first_step: int, last_step: int, *, counted: str = "tokens", quiet: bool = False) -> None:
        """
        Args:
            counted: what the speed is counted in, 'tokens' or 'samples'.
        """
        speed = f"speed/{counted}_per_s"
        self._shown = ("loss/train", "loss/val", "lr", "grad/norm", speed)
        self._out = rich.console.Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._first, self._last = first_step, last_step
        self._started_s = time.monotonic()
        self._bar: Progress | None = None
        if self._out.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("loss/train {task.fields[loss]}  {task.fields[speed]} " + f"{counted}/s  ETA"),
                TimeRemainingColumn(),
                console=self._out,
            )
            self._task = self._bar.add_task("", total=last_step, completed=first_step, loss="-", speed="-")
            self._bar.start()

    def tick(self, step: int, loss: float, speed: float) -> None:
        """Moves the bar; does nothing where there is none."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", speed=f"{speed:,.0f}")

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """Prints the values that people watch, and on plain output how long it will take."""
        names = [*(name for name in self._shown if name in values), *(n for n in values if n.startswith("val/"))]
        shown = "  ".join(f"{name} {_short(values[name])}" for name in names)
        eta = "" if self._bar is not None or "loss/train" not in values else f"  ETA {self._eta(step)}"
        text = f"step {step}/{self._last}  {shown}"
        self._out.print(text + eta)
        _log.info(text)

    def say(self, text: str) -> None:
        """Prints a line that is no metric."""
        self._out.print(text, markup=False)
        _log.info(text)

    def close(self) -> None:
        """Gives the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _eta(self, step: int) -> str:
        done = max(step - self._first, 1)
        left_s = int((time.monotonic() - self._started_s) / done * (self._last - step))
        return f"{left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
