"""Continue a text, coloured by depth: `mor generate` as a script.

python examples/generate.py "Once upon a time" --model runs/tiny/model
"""

import sys

from mor_tools.commands import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
