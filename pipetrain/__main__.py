"""`python -m pipetrain`: the same as the `pipetrain` command."""

import sys

from pipetrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
