"""Serve a model over HTTP: `mor serve` as a script.

python examples/serve.py --model runs/tiny/model --port 8000
"""

import sys

from mor_tools.commands import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
