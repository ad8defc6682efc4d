"""Pretraining through Megatron-Core: `torchrun -m mor_tools.pretraining --config FILE.yaml`.

`session` is the main path, from text to a trained model. Every other module is one part of it.
"""

import logging
import warnings

# Every process that imports Megatron-Core and torch warns about missing optional packages and about
# torch functions that Megatron-Core calls by their deprecated names.
warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
logging.getLogger("megatron").setLevel(logging.ERROR)
