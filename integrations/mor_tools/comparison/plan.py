"""Which runs a comparison consists of, so that the chosen quantities are equal.

Everything that can be wrong with a comparison is found here, before anything is computed: neither
Megatron-Core nor a process group is needed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mor_tools.comparison.costs import Costs
from mor_tools.comparison.options import QUANTITIES
from mor_tools.comparison.statistics import MOST_SEEDS
from mor_tools.comparison.suggestions import to_match
from mor_tools.pretraining.command_line import read_settings
from mor_tools.pretraining.settings import Settings
from mor_tools.pretraining.settings.rules import require

SAME = (
    "data.path",
    "data.tokenizer",
    "data.vocabulary_size",
    "data.end_of_document",
    "data.sequence_length",
    "data.reset_attention_mask",
    "data.held_out_share",
    "training.global_batch_size",
    "evaluation.batches",
)
"""Settings that say which text is read and which of it is held out; losses on other text cannot be
compared."""
NAMES = {"parameters": "parameters", "kv": "key-value bytes per token"}
"""What the quantities are called that settings must match."""


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    model: str
    seed: int
    settings: Settings


@dataclass(frozen=True)
class Model:
    """One configuration of a comparison."""

    name: str
    """The name of its file, without the ending."""
    settings: Settings
    """Of its runs, but for seed and output."""

    @property
    def costs(self) -> Costs:
        """What its runs cost."""
        return Costs(self.settings)


@dataclass(frozen=True)
class Comparison:
    """Models, seeds and what is equal."""

    models: tuple[Model, ...]
    """The first one is the reference."""
    equal: tuple[str, ...]
    """Some of `QUANTITIES`; exactly one of them is `flops` or `tokens`."""
    seeds: tuple[int, ...]
    output: Path
    budget: float
    """FLOPs or tokens of a run, whichever is equal."""

    @property
    def budget_unit(self) -> str:
        """What `budget` counts: `flops` or `tokens`."""
        return "flops" if "flops" in self.equal else "tokens"

    def folder(self, model: str, seed: int) -> Path:
        """The folder of a run."""
        return self.output / model / f"seed-{seed}"

    def runs(self) -> Iterator[Run]:
        """All runs, seed by seed, so that an unfinished comparison has all models."""
        for seed in self.seeds:
            for model in self.models:
                training = replace(model.settings.training, seed=seed)
                output = str(self.folder(model.name, seed))
                yield Run(
                    model.name, seed, replace(model.settings, training=training, output=output)
                )


def plan(
    files: Sequence[Path],
    equal: Sequence[str],
    *,
    seeds: int = 3,
    output: Path = Path("runs/compare"),
    changes: Sequence[str] = (),
    budget: float | None = None,
    tolerance: float = 0.02,
) -> Comparison:
    """Read the configurations and derive the runs.

    Args:
        files: YAML files of the pretraining script, the reference first.
        equal: the quantities of `QUANTITIES` that are equal. Without `flops` and `tokens`, tokens are
            equal too.
        changes: `key=value` settings for all files.
        budget: FLOPs or tokens of a run; None: those of the first file's `training.steps`.
        tolerance: largest relative deviation in `parameters` and `kv`, which no number of steps can
            make equal.

    Raises:
        ValueError: the settings are wrong, cannot be compared, or differ in a quantity that should be
            equal.
        FileNotFoundError: a file does not exist.
    """
    equal = _checked(equal)
    require(len(files) >= 2, f"{len(files)} configuration: a comparison needs at least 2.")
    require(
        1 <= seeds <= MOST_SEEDS,
        f"--seeds {seeds} must be at least 1 and at most {MOST_SEEDS}. Three show the spread.",
    )
    require(0 <= tolerance < 1, f"--tolerance {tolerance} must be at least 0 and below 1.")
    require(budget is None or 0 < budget < 1e30, f"--budget {budget} must be above 0.")
    models = [Model(file.stem, _read(file, changes)) for file in files]
    names = [model.name for model in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(
        not twice,
        f"two files are named {', '.join(twice)}, and the models are called after their files. "
        "Rename one.",
    )
    for model in models[1:]:
        _require_same_text(models[0], model)
        for quantity in NAMES:
            if quantity in equal:
                to_match(models[0], model, quantity, NAMES[quantity], tolerance)
    reference = models[0].costs
    steps = models[0].settings.training.steps
    if budget is None:
        is_flops = "flops" in equal
        budget = reference.flops(steps) if is_flops else steps * reference.tokens_per_step
    planned = tuple(_with_budget(model, budget, "flops" in equal) for model in models)
    return Comparison(planned, equal, tuple(range(1, seeds + 1)), output, budget)


def _checked(equal: Sequence[str]) -> tuple[str, ...]:
    unknown = [quantity for quantity in equal if quantity not in QUANTITIES]
    require(
        not unknown,
        f"--equal {', '.join(unknown)} is unknown. Use {', '.join(QUANTITIES)}, or several of them "
        "with commas between.",
    )
    require(
        not {"flops", "tokens"} <= set(equal),
        "--equal flops,tokens: both say how long each model trains. Name one of them.",
    )
    extra = () if {"flops", "tokens"} & set(equal) else ("tokens",)
    return tuple(dict.fromkeys((*equal, *extra)))


def _read(file: Path, changes: Sequence[str]) -> Settings:
    try:
        settings = read_settings(str(file), changes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    require(
        settings.training.stop_after is None,
        f"{file}: training.stop_after={settings.training.stop_after} would stop the runs of a "
        "comparison early. Leave it out; a comparison that is interrupted can be resumed.",
    )
    try:
        Costs(settings).flops_per_token  # noqa: B018 (raises)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return settings


def _require_same_text(reference: Model, model: Model) -> None:
    different = [
        f"{name}={_value(model.settings, name)!r} (in {reference.name}: "
        f"{_value(reference.settings, name)!r})"
        for name in SAME
        if _value(model.settings, name) != _value(reference.settings, name)
    ]
    require(
        not different,
        f"{model.name} reads other text than {reference.name}, so that their losses cannot be "
        f"compared: {', '.join(different)}. Use the same values, for all files with "
        "--set key=value.",
    )


def _value(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _with_budget(model: Model, budget: float, is_flops: bool) -> Model:
    """The model with the number of steps that the budget allows.

    Warmup and decay keep their share of the steps, so that the schedule has the same shape.
    """
    costs, training = model.costs, model.settings.training
    per_step = costs.flops(1) if is_flops else costs.tokens_per_step
    require(
        budget >= per_step,
        f"{model.name}: one step takes {per_step:.4g} {'FLOPs' if is_flops else 'tokens'}, more than "
        f"the budget of {budget:.4g}. Use a larger --budget.",
    )
    steps = costs.steps_for(budget) if is_flops else round(budget / per_step)
    if steps == training.steps:
        return model
    scale = steps / training.steps
    changed = replace(
        training,
        steps=steps,
        warmup_steps=int(training.warmup_steps * scale),
        decay_steps=int(training.decay_steps * scale),
    )
    return replace(model, settings=replace(model.settings, training=changed))
