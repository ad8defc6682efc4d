"""`torchrun -m mor_tools.pretraining --config FILE.yaml [key=value ...]`."""

import signal
import sys

# Imports take seconds, in which Ctrl-C would print a traceback for each process.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from mor_tools.pretraining.session import main  # noqa: E402

if __name__ == "__main__":
    main(sys.argv[1:])
