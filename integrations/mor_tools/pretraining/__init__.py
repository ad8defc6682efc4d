"""Pretraining through Megatron-Core: `torchrun -m mor_tools.pretraining --config FILE.yaml`.

`session` is the main path: from text to a trained model. Everything else is one part of it.
"""

import logging
import warnings

# Megatron-Core and torch say in every process which optional packages are missing, and which of
# torch's functions Megatron-Core calls by their old names.
warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
logging.getLogger("megatron").setLevel(logging.ERROR)
