"""summary.json: the results of a run, for programs."""

import json
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mor_layers import to_mapping
from mor_tools.pretraining.reporting.history import History
from mor_tools.pretraining.run_folder import write_atomically
from mor_tools.pretraining.settings import Settings
from mor_tools.reports.rows import Validation


def write_summary(
    path: Path,
    settings: Settings,
    history: History,
    *,
    validation: Validation,
    unigram_entropy: float,
    parameters: int,
    flops_per_token: float,
    sample: str,
) -> None:
    """Write the summary of a completed run.

    Losses and entropy are in nats per token; FLOPs are those of training; `tokens_per_second` is
    the median over the run. `depth_shares[d]` is the fraction of held-out tokens that took `d`
    steps, and null with several recursions; `step_shares[r]` is the fraction that ran step `r + 1`,
    with the steps of several recursions one after another. Figures with the prefix `causal_` are
    measured with tokens routed as in generation.
    """
    speeds = [row.tokens_per_second for row in history.rows if row.tokens_per_second is not None]
    summary = {
        "validation_loss": validation.loss,
        "causal_validation_loss": validation.causal_loss,
        "unigram_entropy": unigram_entropy,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "parameters": parameters,
        "flops_per_token": flops_per_token,
        "depth_shares": validation.routing and validation.routing.depth_shares,
        "causal_depth_shares": validation.causal_routing and validation.causal_routing.depth_shares,
        "step_shares": validation.routing and validation.routing.shares,
        "causal_step_shares": validation.causal_routing and validation.causal_routing.shares,
        "steps": settings.training.steps,
        "sample": sample,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("megatron-core", "transformer-engine")},
        },
        "settings": to_mapping(settings),
    }
    write_atomically(path, json.dumps(summary, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
