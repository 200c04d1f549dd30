"""Side by side: pipetrain, torch.distributed.pipelining and torchgpipe on the same layers, in one run, in turns.

    make bench                                    all parts; tables, bench/bench.json and bench/emulated.svg
    .venv/bin/python scripts/bench emulated       one part; --help lists them

Every measurement is kept in a file of its own under bench/cells/, and one that is there is not made again: an
interrupted run goes on where it stopped, `--again` starts over. Run it on an idle machine.
"""

import argparse
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))

import balance
import emulated
import gain
import memory
import overhead
import planned
import real
import stale
import tables

PARTS = {
    "balance": balance.measure,
    "planned": planned.measure,
    "gain": gain.measure,
    "overhead": overhead.measure,
    "zero_bubble": emulated.measure_zero_bubble,
    "real": real.measure,
    "memory": memory.measure,
    "emulated": emulated.measure,
    "stale": stale.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"any of {', '.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=Path("bench"))
    parser.add_argument("--again", action="store_true", help="measure everything anew")
    arguments = parser.parse_args()
    cells = arguments.output / "cells"
    if arguments.again:
        shutil.rmtree(cells, ignore_errors=True)
    results: dict[str, Any] = {
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "processor": platform.processor(),
            "torch": torch.__version__,
        }
    }
    for part in arguments.parts:
        results[part] = PARTS[part](cells)
        print(tables.SHOWN[part](results[part]), flush=True)
    if "emulated" in results:
        tables.draw_emulated(results["emulated"], arguments.output / "emulated.svg")
    (arguments.output / "bench.json").write_text(json.dumps(results, indent=2))
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    mp.set_forkserver_preload(["torch", "torch.distributed.pipelining"])
    main()
