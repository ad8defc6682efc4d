"""The tables of docs/pages/support.md, asked of the code: what is refused, and what is not.

    PYTHONPATH=.:integrations:examples python -m tests.docs.support_table

writes them into the page anew.
"""

import sys
from functools import cache
from pathlib import Path
from typing import get_args

from mor_layers import RecursionConfig, RouterConfig
from mor_layers.recursion import KVPolicy, Sharing
from mor_tools.pretraining.command_line import load_settings
from mor_tools.pretraining.models import build
from tests.mor_layers.random_configs import OURS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pages" / "support.md"
STEPS = 3
YES, NO = "yes", "–"

COLUMNS: dict[str, list[str]] = {
    "one process": [],
    "TP": ["parallel.tensor=2"],
    "TP + SP": ["parallel.tensor=2", "parallel.sequence_parallel=true"],
    "CP": ["parallel.context=2"],
    "EP": ["parallel.expert=2"],
    "PP, one stage": ["parallel.pipeline=2"],
    "PP, steps as stages": ["parallel.pipeline=2", "parallel.pipeline_layout=steps_as_stages"],
    "recompute full": ["training.recompute=full"],
    "selective": ["training.recompute=selective"],
}
MOE = ["model.moe.num_experts=4"]
DENSE = ["model.moe=null"]
WIDTH = ["recursion.router.type=depth_and_width", "recursion.router.mean_experts=1.5"]
ROWS: dict[str, list[str]] = {
    "no recursion: a plain GPT": ["recursion=null", *DENSE],
    "experts (`model.moe`)": MOE,
    "experts, a router over them per step": [*MOE, "recursion.expert_routers=per_step"],
    "experts, a mean number of them held": [*MOE, *WIDTH],
    **{
        f"`{name}`": [f"recursion.router.type={name}", *DENSE]
        for name in sorted(set(OURS) - {"deepened"})
    },
    "`random_loops`, gradients through the last step": [
        "recursion.router.type=random_loops",
        "recursion.router.backward_steps=1",
        "recursion.input_injection=true",
        *DENSE,
    ],
    **{
        f"KV policy `{name}`": [f"recursion.kv_policy={name}", *DENSE]
        for name in get_args(KVPolicy)[1:]
    },
    **{
        f"sharing `{name}`": [
            f"recursion.sharing={name}",
            "recursion.router.type=fixed_depth",
            "model.num_unrolled_layers=8"
            if name.startswith("middle")
            else "model.num_unrolled_layers=6",
            *DENSE,
        ]
        for name in get_args(Sharing)
    },
    "Mixture-of-Depths (`anchor_every`)": [
        "recursion.sharing=middle_sequence",
        "recursion.num_recursions=1",
        "recursion.router.capacity_factors=[0.25]",
        "recursion.anchor_every=2",
        *DENSE,
    ],
    "the same with `depth_balance`": [
        "recursion.sharing=middle_sequence",
        "recursion.num_recursions=1",
        "recursion.router.capacity_factors=[0.25]",
        "recursion.anchor_every=3",
        "recursion.depth_balance=0.1",
        *DENSE,
    ],
    "two recursions, one after another": [
        "recursion=[{num_recursions: 2, block_layers: 1}, {num_recursions: 2, router: {type: "
        "expert_choice}}]",
        "model.num_unrolled_layers=8",
        *DENSE,
    ],
    "a prelude of 2 layers, a coda of 3": [
        "recursion.prelude_layers=2",
        "recursion.coda_layers=3",
        "model.num_unrolled_layers=11",
        *DENSE,
    ],
    "norms per step": ["recursion.share_norms=false", *DENSE],
    "attention per step": ["recursion.own_per_step=[attention]", *DENSE],
    "an MLP per step": ["recursion.own_per_step=[mlp]", *DENSE],
    "attention per step, shared experts": ["recursion.own_per_step=[attention]", *MOE],
    "low-rank deltas": ["recursion.relaxation.rank=4", *DENSE],
    "`step_embeddings`": ["recursion.step_embeddings=true", *DENSE],
    "`input_injection`": ["recursion.input_injection=true", *DENSE],
    "`loop_norm`": ["recursion.loop_norm=true", *DENSE],
    "`sandwich_norms`": ["recursion.sandwich_norms=true", *DENSE],
    "`residual_scale`": ["recursion.residual_scale=1.0", *DENSE],
    "`hyper_connections`, static": ["recursion.hyper_connections.mixing=static", *DENSE],
    "`hyper_connections`, dynamic": ["recursion.hyper_connections.mixing=dynamic", *DENSE],
    "`norm_modulation`": ["recursion.norm_modulation.rank=4", *DENSE],
    "`history`": ["recursion.history.window=1", *DENSE],
    "`loop_loss`": ["recursion.loop_loss.scale_penalty=0.1", *DENSE],
    "`loop_loss`, and an exit gate that it teaches": [
        "recursion.loop_loss.scale_penalty=0.1",
        "recursion.router.type=exit_gate",
        "recursion.router.teaching=0.5",
        *DENSE,
    ],
    "a teacher (`uptrain`)": ["uptrain.teacher=folder", *DENSE],
}


def is_refused(layout: list[str], row: list[str]) -> str | None:
    """Why the pretraining script refuses these settings; None where it takes them."""
    base = ["parallel.tensor=1", "parallel.sequence_parallel=false"]
    config = str(ROOT / "examples" / "configs" / "tiny.yaml")
    if "recursion=null" in row:
        # The file's recursion goes as a whole; what a row says of one would bring a part of it back.
        row = [change for change in row if not change.startswith("recursion.")]
    try:
        build.check(load_settings(["--config", config, *base, *layout, *row]))
    except ValueError as error:
        return str(error)
    return None


@cache
def layout_table() -> str:
    """Rows of the table of settings and layouts."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in ROWS.items():
        cells = []
        for layout in COLUMNS.values():
            # Experts are the only thing that expert parallelism could spread.
            changes = row
            if "parallel.expert=2" in layout:
                changes = [change for change in row if change not in DENSE] + MOE
                if "low-rank" in name:  # experts have no such projections
                    changes.append("recursion.relaxation.projections=[query,output]")
            cells.append(YES if is_refused(layout, changes) is None else NO)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def router_config(name: str) -> RouterConfig:
    """The router of that name, by default."""
    return OURS[name]()


def recursion(router: str, sharing: str, policy: str) -> RecursionConfig | None:
    """A recursion of these; None where it is refused."""
    try:
        return RecursionConfig(STEPS, sharing, router_config(router), policy)  # type: ignore[arg-type]
    except ValueError:
        return None


def routers() -> list[str]:
    """Names of those that stand alone."""
    return sorted(set(OURS) - {"deepened"})


@cache
def router_table() -> str:
    """Rows of the table of routers, sharing schemes and KV policies."""
    policies = get_args(KVPolicy)
    names = " | ".join(f"`{policy}`" for policy in policies)
    lines = [f"| router | sharing | {names} |", "|---" * (len(policies) + 2) + "|"]
    for router in routers():
        for pair in (("cycle", "middle_cycle"), ("sequence", "middle_sequence")):
            rows = [[recursion(router, sharing, policy) for policy in policies] for sharing in pair]
            cells = [[NO if found is None else YES for found in row] for row in rows]
            assert cells[0] == cells[1], f"{pair} differ for {router}"
            shown = " | ".join(cells[0])
            lines.append(f"| `{router}` | `{pair[0]}`, `{pair[1]}` | {shown} |")
    return "\n".join(lines)


TABLES = {"routers": router_table, "layouts": layout_table}


def written(page: str) -> str:
    """The page with its tables as the code has them."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, after = page.split(begin)[0], page.split(end)[1]
        page = f"{before}{begin}\n\n{table()}\n\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
