"""Trains a small model under ZeRO on CPUs: `torchrun ... train.py STAGE FILE`, one process a rank.

The first rank writes the losses of the global batches and the trained weights.
"""

import os
import sys
from pathlib import Path

import deepspeed  # type: ignore[import-not-found]
import torch

import mor_huggingface
from mor_layers import DecoderConfig, ExpertChoice, RecursionConfig

STEPS, BATCH = 4, 4


def main(stage: int, file: Path) -> None:
    torch.manual_seed(0)
    recursion = RecursionConfig(3, router=ExpertChoice(warmup_steps=2))
    config = DecoderConfig(100, 32, 64, num_unrolled_layers=5, num_heads=4, recursion=recursion)
    model = mor_huggingface.MoRForCausalLM(mor_huggingface.MoRConfig.from_decoder(config))
    ranks = int(os.environ["WORLD_SIZE"])
    deepspeed.init_distributed("gloo")
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": BATCH // ranks,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "gradient_clipping": 1.0,
        },
    )
    rank, losses = torch.distributed.get_rank(), []
    generator = torch.Generator().manual_seed(1)
    for ids in torch.randint(100, (STEPS, BATCH, 16), generator=generator):
        own = ids.chunk(ranks)[rank]
        output = engine(own, labels=own)
        engine.backward(output.loss)
        engine.step()
        loss = output.loss.detach() / ranks
        torch.distributed.all_reduce(loss)
        losses.append(loss.item())
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save({"losses": losses, "weights": weights}, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
