"""What the fork server of the worker pool imports once, so that no worker takes seconds for it."""

import gc

import mor_megatron as mor_megatron
from tests.distributed import megatron_setup as megatron_setup

gc.collect()
gc.freeze()  # which forks inherit: none of them walks what was imported
