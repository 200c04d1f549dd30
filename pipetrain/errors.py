"""The exceptions that a user can meet, and the exit codes that a run can end with."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit code of a run: one number for each way in which it can end."""

    DONE = 0
    FAILED = 1
    BAD_SETTINGS = 2
    NO_CHECKPOINT = 3
    NON_FINITE = 5
    PREEMPTED = 75
    INTERRUPTED = 130
    TERMINATED = 143


class PipetrainError(Exception):
    """Base of every error whose text is written for the user: printed without a traceback."""

    exit_code: Exit = Exit.FAILED


class ConfigError(PipetrainError, ValueError):
    """A setting that cannot work. The text holds the value, the rule and the way out."""

    exit_code = Exit.BAD_SETTINGS


class CheckpointError(PipetrainError, RuntimeError):
    """No checkpoint can be used, or one cannot be written."""

    exit_code = Exit.NO_CHECKPOINT


class NonFiniteError(PipetrainError, ArithmeticError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = Exit.NON_FINITE


class DataError(PipetrainError, RuntimeError):
    """A sample that cannot be read; the text names its file."""


class ScheduleError(ConfigError):
    """A schedule that is not once-each, ordered, deadlock-free or within its bounds."""


class StageFailed(PipetrainError, RuntimeError):
    """One stage of a run failed; the others were stopped."""


class LayerError(PipetrainError, RuntimeError):
    """A layer does what a pipeline cannot carry; the text names it."""
