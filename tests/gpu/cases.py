"""What `make test-gpu` runs, in order: from arithmetic to layers to layouts to speed."""

from dataclasses import replace

import torch

from mor_layers import ExpertChoice, RecursionConfig, TokenChoice
from tests.gpu import graphs, kernels, layers, layouts, serving
from tests.gpu.layers import LENGTH
from tests.gpu.speed import realised_savings
from tests.gpu.speed.contender import Execution
from tests.gpu.speed.savings import BAR
from tests.gpu.verdict import Case, Need

ROUTERS = {"expert": ExpertChoice(alpha=0.5), "token": TokenChoice()}
POLICIES = ("recursion_wise", "recursive_sharing", "sharing_with_update", "exit_state")
EXPERT = RecursionConfig(3, router=ROUTERS["expert"])
CYCLE = replace(EXPERT, sharing="cycle")
ENGINE: tuple[Need, ...] = ("transformer_engine",)
# Heads of 64 and blocks of 128, as kernels for bf16 and FP8 like them.
WIDE = {"bf16": True, "hidden_size": 256, "ffn_hidden_size": 512}

_CORE = [
    Case(
        f"core/{name}",
        "GPTModel on the GPU gives MoRTransformer's logits on the CPU, fp32",
        layers.gpu_gives_what_the_core_gives_on_a_cpu,
        {"recursion": RecursionConfig(3, router=router)},
    )
    for name, router in ROUTERS.items()
]

_ENGINE = [
    Case(
        "engine/signatures",
        "the installed Transformer Engine takes what the CPU tests' stand-in takes",
        layers.signatures_are_those_recorded,
        needs=ENGINE,
    ),
    *(
        Case(
            f"engine/fp32/{name}/{policy}",
            "Transformer Engine's layers give the local layers' numbers, fp32",
            layers.engine_equals_local,
            {"recursion": RecursionConfig(3, router=router, kv_policy=policy)},
            needs=ENGINE,
        )
        for name, router in ROUTERS.items()
        for policy in POLICIES
    ),
    *(
        Case(
            f"engine/bf16/{name}",
            "the same with fused attention, bf16",
            layers.engine_equals_local,
            {
                "recursion": RecursionConfig(3, router=ROUTERS["token"], kv_policy=policy),
                "loss_within": 0.05,
                "cosine_above": 0.95,
                **WIDE,
            },
            needs=ENGINE,
        )
        for name, policy in (("causal", "recursion_wise"), ("masked", "recursive_sharing"))
    ),
    Case(
        "engine/experts",
        "grouped expert products give the local experts' numbers, fp32",
        layers.engine_equals_local,
        {"recursion": EXPERT, "experts": 4},
        needs=ENGINE,
    ),
    *(
        Case(
            f"engine/documents/{name}",
            "documents as packed (thd) sequences give the masked numbers, bf16",
            layers.engine_equals_local,
            {
                "recursion": replace(CYCLE, router=router),
                "num_layers": 6,
                "with_documents": True,
                "loss_within": 0.05,
                "cosine_above": 0.95,
                **WIDE,
            },
            needs=ENGINE,
        )
        for name, router in ROUTERS.items()
    ),
    Case(
        "engine/fused gradients",
        "gradients that linear layers add to main_grad themselves hold all steps, fp32",
        layers.settings_change_little,
        {
            "recursion": EXPERT,
            "loss_within": 1e-5,
            "cosine_above": 0.99999,
            "change": {"fused_gradients": True},
        },
        needs=ENGINE,
    ),
    Case(
        "engine/rotary",
        "the fused rotary embedding by an indexed table turns as ours does, fp32",
        layers.settings_change_little,
        {
            "recursion": EXPERT,
            "loss_within": 1e-4,
            "cosine_above": 0.9999,
            "change": {"apply_rope_fusion": True},
        },
        needs=ENGINE,
    ),
    *(
        Case(
            f"engine/fp8/{recipe}",
            "a quantization recipe stays near bf16",
            layers.settings_change_little,
            {
                "recursion": EXPERT,
                "loss_within": 0.1,
                "cosine_above": 0.9,
                "change": {"fp8": "hybrid", "fp8_recipe": recipe},
                **WIDE,
            },
            needs=(*ENGINE, need),
        )
        for recipe, need in (("tensorwise", "fp8"), ("blockwise", "fp8"), ("mxfp8", "mxfp8"))
    ),
]

_REST = [
    Case(
        "host waits",
        "our code does not wait for the device in a training step with fixed capacities",
        layers.nothing_waits_for_the_device,
        {"recursion": EXPERT},
    ),
    Case(
        "apex/norms",
        "apex's fused norms give ours, bf16",
        layers.apex_norms_equal_ours,
        needs=("apex",),
    ),
]

_KERNELS = [
    *(
        Case(
            f"kernels/rows/{name}",
            "fused selection, norm, gate and write-back give plain PyTorch's numbers, bit for bit again",
            kernels.rows_equal_plain,
            {"dtype": dtype, "shape": (1000, 3, 341, 2000)},
            {"shape": (11, 2, 5, 33)},
        )
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ),
    *(
        Case(
            f"kernels/model/{name}/{policy}",
            "a model with fused kernels and FlexAttention trains as with plain PyTorch, fp32",
            kernels.model_equals_plain,
            {
                "recursion": RecursionConfig(3, router=router, kv_policy=policy),
                "length": 700,
                "hidden_size": 128,
            },
            {"length": 150, "hidden_size": 32},
        )
        for name, router in ROUTERS.items()
        for policy in POLICIES
    ),
    *(
        Case(
            f"kernels/compiled/{policy}",
            "the same in one graph of torch.compile",
            kernels.model_equals_plain,
            {
                "recursion": replace(EXPERT, kv_policy=policy),
                "length": 700,
                "hidden_size": 128,
                "is_compiled": True,
            },
            {"length": 150, "hidden_size": 32},
        )
        for policy in ("recursive_sharing", "exit_state")
    ),
]

_GRAPHS = [
    *(
        Case(
            f"graphs/core/{policy}",
            "forward and backward pass of MoRTransformer, replayed as one CUDA graph, fp32",
            graphs.core_replays,
            {
                "recursion": replace(EXPERT, kv_policy=policy),
                "length": 200,
                "hidden_size": 128,
            },
            {"length": 24, "hidden_size": 32},
        )
        for policy in POLICIES
    ),
    *(
        Case(
            f"graphs/{impl}/{policy}",
            "GPTModel trains in Megatron's CUDA graphs as without, fp32",
            graphs.megatron_replays,
            {"recursion": replace(EXPERT, kv_policy=policy), "impl": impl, "length": LENGTH},
            {"impl": "none"},
        )
        for impl in ("local", "full_iteration")
        for policy in ("recursion_wise", "exit_state")
    ),
]

_SERVING = [
    Case(
        f"serving/{policy}",
        "ticks that replay CUDA graphs give the full pass's tokens and depths, fp32",
        serving.replayed_ticks_give_the_full_pass,
        {"recursion": RecursionConfig(3, router=ROUTERS["token"], kv_policy=policy)},
    )
    for policy in POLICIES[:3]
]

_LAYOUTS = [
    Case(
        f"layout/{name}",
        "two ranks over NCCL give one rank's loss and gradients, fp32",
        layouts.layout_equals_one_rank,
        {"recursion": EXPERT, "layout": layout, **settings},
        gpus=2,
    )
    for name, layout, settings in (
        ("dp", {}, {}),
        ("tp", {"tp": 2}, {}),
        ("tp+sp", {"tp": 2}, {"sequence_parallel": True}),
        ("pp", {"pp": 2}, {}),
        ("cp", {"cp": 2}, {}),
        (
            "ep",
            {"ep": 2},
            {
                "num_moe_experts": 4,
                "moe_router_topk": 2,
                "moe_token_dispatcher_type": "alltoall",
            },
        ),
    )
]

_TIMED = ROUTERS | {"tiles": ExpertChoice(alpha=0.5, capacity_multiple=128)}
_SMALL_TILES = {"tiles": {"router": ExpertChoice(alpha=0.5, capacity_multiple=4)}}
_TINY = {"hidden_size": 64, "length": 32, "rounds": 1, "has_bar": False}
_SPEED = [
    Case(
        f"speed/{name}",
        f"{how}, saved time is {BAR:g} of the saved FLOPs or more; bf16, h = 2048, s = 4096",
        realised_savings.saves_time,
        {"router": _TIMED[router], "policies": POLICIES, "execution": execution},
        _TINY | _SMALL_TILES.get(router, {}),
        needs=ENGINE if execution.has_engine else (),
    )
    for name, how, router, execution in (
        ("expert/eager", "eager and as a CUDA graph", "expert", Execution(is_static=True)),
        ("expert/tiles", "in tiles of 128 rows", "tiles", Execution(is_static=True)),
        ("token/eager", "eager", "token", Execution()),
        (
            "expert/compiled",
            "compiled and as a CUDA graph",
            "expert",
            Execution(is_compiled=True, is_static=True),
        ),
        ("expert/engine", "on Transformer Engine", "expert", Execution(has_engine=True)),
        ("token/engine", "on Transformer Engine", "token", Execution(has_engine=True)),
    )
]

CASES: tuple[Case, ...] = (
    *_CORE,
    *_ENGINE,
    *_REST,
    *_KERNELS,
    *_GRAPHS,
    *_SERVING,
    *_LAYOUTS,
    *_SPEED,
)
