"""`python drive.py FAULT key=value ...`: the pipetrain command with workers that have a fault (see `faulty`)."""

import sys

from pipetrain import cli, processes

if __name__ == "__main__":
    # The fork server imports this before it makes workers, so they inherit what it changes.
    processes.PRELOADED.append("faulty")
    sys.exit(cli.main(sys.argv[2:]))
