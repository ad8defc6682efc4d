"""Faults of the layers inside Megatron-Core."""

from tests.campaigns.planted_faults.fault import MEGATRON, Fault

LAYERS = "distributed/layers"
MEGATRON_TRAINING = "distributed/training distributed/layers/test_recursion_layer.py"

MEGATRON_FAULTS = [
    Fault(
        "gradients of scores are summed over ranks",
        MEGATRON + "step/placement.py",
        "logits, tensor_parallel_output_grad=False, group=self.group",
        "logits, tensor_parallel_output_grad=True, group=self.group",
        LAYERS + "/test_recursion_layer.py",
    ),
    Fault(
        "gradients of rows that are put back are not summed",
        MEGATRON + "step/placement.py",
        "updated, tensor_parallel_output_grad=True, group=self.group",
        "updated, tensor_parallel_output_grad=False, group=self.group",
        LAYERS + "/test_recursion_layer.py",
    ),
    Fault(
        "ranks' filling takes part",
        MEGATRON + "step/placement.py",
        "return shard_of(is_padding, group, fill=True)",
        "return shard_of(is_padding, group, fill=False)",
        LAYERS,
    ),
    Fault(
        "the gradient of gates stays on its rank",
        MEGATRON + "step/placement.py",
        "return shard_of(copy_to_tensor_model_parallel_region(values, group=self.group), self.group)",
        "return shard_of(values, self.group)",
        LAYERS + "/test_recursion_layer.py",
    ),
    Fault(
        "routers' parameters are not marked for sequence parallelism",
        MEGATRON + "layers/recursion.py",
        'setattr(parameter, "sequence_parallel", config.sequence_parallel)',
        'setattr(parameter, "sequence_parallel", False)',
        MEGATRON_TRAINING,
    ),
    Fault(
        "statistics count a recomputed pass twice",
        MEGATRON + "layers/recursion.py",
        "        if is_counted:\n            self.statistics.record",
        "        if True:\n            self.statistics.record",
        MEGATRON_TRAINING,
    ),
    Fault(
        "counts stay on their data-parallel rank",
        MEGATRON + "layers/routing/updates.py",
        "torch.distributed.all_reduce(counts, group=data_group())\n    layer.recursion",
        "counts = counts.clone()\n    layer.recursion",
        MEGATRON_TRAINING,
    ),
    Fault(
        "observations stay on their data-parallel rank",
        MEGATRON + "layers/routing/updates.py",
        "        torch.distributed.all_reduce(value, group=data_group())\n    layer.rec",
        "        value.clone()\n    layer.rec",
        "distributed/layers/test_depth_by_expert.py distributed/training",
    ),
    Fault(
        "a router's loss ignores the loss scale",
        MEGATRON + "layers/routing/auxiliary_loss.py",
        "gradient = gradient * RouterLossScaler.scale.to(loss)",
        "gradient = gradient * 1.0",
        MEGATRON_TRAINING,
    ),
    Fault(
        "a function of the user's is not called any more",
        MEGATRON + "layers/routing/auxiliary_loss.py",
        "            self.earlier(scale)\n",
        "            pass\n",
        "distributed/training/test_updates_by_hand.py",
    ),
    Fault(
        "a document begins a token late",
        MEGATRON + "step/documents.py",
        "torch.cat([torch.zeros_like(begins[:, :1]), begins], dim=1).cumsum(dim=1)",
        "torch.cat([begins, torch.zeros_like(begins[:, :1])], dim=1).cumsum(dim=1)",
        LAYERS + "/test_documents.py",
    ),
    Fault(
        "context-parallel rows lie in zigzag order inside",
        MEGATRON + "step/context_parallel.py",
        "return torch.cat([chunks[0], chunks[1].flip(0)], dim=1)",
        "return torch.cat([chunks[0], chunks[1]], dim=1)",
        LAYERS + "/test_context_parallel.py",
    ),
    Fault(
        "the z-loss of experts is averaged over ranks' own means",
        MEGATRON + "layers/experts/padding.py",
        "torch.distributed.all_reduce(total, group=self.tp_cp_group)",
        "total = total * self.tp_cp_group.size()",
        LAYERS + "/test_depth_by_expert.py distributed/training",
    ),
    Fault(
        "experts of every step share a cell",
        MEGATRON + "layers/experts/router.py",
        "self.load[step] += taken.sum(dim=0)",
        "self.load[0] += taken.sum(dim=0)",
        LAYERS + "/test_depth_by_expert.py",
    ),
    Fault(
        "the teacher's divergence is one rank's",
        MEGATRON + "training/distillation.py",
        "        torch.distributed.all_reduce(divergence, group=group)\n",
        "",
        "distributed/training/test_distillation.py",
    ),
    Fault(
        "the teacher's gradient lacks its temperature",
        MEGATRON + "training/distillation.py",
        "gradient = ctx.temperature * gradients[0]",
        "gradient = gradients[0]",
        "distributed/training/test_distillation.py",
    ),
    Fault(
        "every step takes the expert bias of the first",
        MEGATRON + "checkpoints/weights.py",
        "return parts[0][_step_of(name)]",
        "return parts[0][0]",
        "distributed/checkpoints/test_weights.py",
    ),
    Fault(
        "a stage may begin between layers that balance depth",
        MEGATRON + "parallel/stages.py",
        "return recursion.anchor_every or num_blocks",
        "return 1",
        "mor_layers/models/test_mixture_of_depths.py",
    ),
]
