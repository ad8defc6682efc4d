"""The parts of `pretrain_gpt_mor.py`, each about one thing."""

import logging
import warnings

# Megatron-Core and torch say in every process which optional packages are missing, and which of
# torch's functions Megatron-Core calls by their old names.
warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
logging.getLogger("megatron").setLevel(logging.ERROR)
