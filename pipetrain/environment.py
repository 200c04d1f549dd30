"""What a run ran on: versions, machine and command line, for whoever looks at its folder later."""

import json
import os
import platform
import shlex
import sys
import time
from importlib import metadata

import torch

from pipetrain.paths import RunPaths


def write_environment(run: RunPaths) -> None:
    """Leaves it in the run folder."""
    packages = (
        "torch",
        "torchvision",
        "hydra-core",
        "omegaconf",
        "numpy",
        "sentencepiece",
        "tensorboard",
        "safetensors",
    )
    content = {
        "pipetrain": metadata.version("pipetrain"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in packages},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cores": len(os.sched_getaffinity(0)),
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    run.environment.write_text(json.dumps(content, indent=2))
