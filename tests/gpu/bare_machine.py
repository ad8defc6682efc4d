"""Lets the cases run where only PyTorch, Megatron-Core and OmegaConf are installed.

Of what else the library imports, only jaxtyping is needed: names of array types for annotations. Where
it is missing, a stand-in takes its place, for this process and those that it starts. Import this module
before the library.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

lacks_jaxtyping = find_spec("jaxtyping") is None
if lacks_jaxtyping:
    sys.path.append(str(Path(__file__).parent / "bare"))
