"""torchvision, also where it does not match the torch that is installed."""

import importlib
import multiprocessing
import warnings
from types import ModuleType

import torch

# Operators that torchvision's own library would define; it registers more about them while it is imported.
_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = {"torchvision::nms": _NMS, "torchvision::qnms": _NMS}


def import_torchvision(name: str = "torchvision") -> ModuleType:
    """The package torchvision, or a module of it.

    A torchvision built for CUDA fails on a CPU torch for want of operators that only detection needs. They are
    declared then, never before: a sound torchvision defines them itself and would fail on a second definition.
    """
    declared: list[str] = []
    while True:
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            missing = next((name for name in _OPERATORS if name in str(error) and name not in declared), None)
            if missing is None:
                raise
            if not declared and multiprocessing.parent_process() is None:  # said once, not by every worker
                warnings.warn(
                    f"torchvision does not match torch {torch.__version__}: its compiled operators (detection, image "
                    "decoding) are off, models and transforms work; install the pair that belongs together",
                    stacklevel=2,
                )
            torch.library.define(missing, _OPERATORS[missing])
            declared.append(missing)
