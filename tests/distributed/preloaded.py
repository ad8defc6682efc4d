"""What every worker of the pool imports before its first run.

The fork server of the pool imports this once, so that a new worker has it at once instead of after
several seconds of its own.
"""

import gc

import mor_megatron as mor_megatron
from tests.distributed import megatron_setup as megatron_setup

gc.collect()
gc.freeze()  # which forks inherit: none of them walks what was imported
