"""`torchrun -m mor_tools.pretraining --config FILE.yaml [key=value ...]`."""

import sys

from mor_tools.pretraining.session import main

if __name__ == "__main__":
    main(sys.argv[1:])
