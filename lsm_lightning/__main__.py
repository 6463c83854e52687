"""`python -m lsm_lightning fit | validate --config FILE`."""

import os
import sys

# Threads that spin while they wait cost a busy machine up to five times the time; this must precede torch's import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> int:
    """Run the command line; importing is left until here so that the settings above come first."""
    from lsm_lightning.cli import main as run_main

    return run_main()


if __name__ == "__main__":
    sys.exit(main())
