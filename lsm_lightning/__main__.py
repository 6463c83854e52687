"""`python -m lsm_lightning fit | validate | probe | plan --config FILE`, or `export RUN -o DIR`."""

import logging
import sys


def main() -> int:
    """Run the command line; classes of a configuration may stand in the current folder, as with `python -m`."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    # Where it is installed, it is loaded with peft and tells of optional kernels, also those who use neither.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from lsm_lightning.cli import main as run_main
    except KeyboardInterrupt:  # it takes seconds
        print("Interrupted before training began; nothing to save.", file=sys.stderr)
        return 130
    return run_main()


if __name__ == "__main__":
    sys.exit(main())
