"""Pretrain a GPT with Mixture-of-Recursions and Mixture-of-Experts through Megatron-Core.

    torchrun --nproc-per-node 2 examples/pretrain_gpt_mor.py \\
        --config examples/configs/tiny.yaml training.steps=200

The same command runs on CPU processes (gloo) and on GPUs (NCCL), and `--help` lists every setting.
`torchrun -m mor_tools.pretraining` is the same without this file. A script of your own can begin like
this one: a router that it registers before `main` (see `custom_router.py`) can be named in the YAML
file.
"""

import sys

from mor_tools.pretraining.session import main

if __name__ == "__main__":
    main(sys.argv[1:])
