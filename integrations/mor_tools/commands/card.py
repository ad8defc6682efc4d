"""Write the model card of a finished pretraining run, ready for a model hub.

    mor card runs/tiny --license apache-2.0
    mor card runs/tiny --name my-model --output card/

The card is the README.md beside the run's model: its figures, how it was trained, and how to use it.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mor_layers import from_mapping
from mor_tools.comparison.costs import Costs
from mor_tools.comparison.tables import depth_text
from mor_tools.formats import RUN_MODEL
from mor_tools.pretraining.run_folder import write_atomically
from mor_tools.pretraining.settings import Settings

SUMMARY = "summary.json"
OTHER_TEXT = "the documentation that ships with Python"


def run(options: argparse.Namespace) -> None:
    """Write the card.

    Raises:
        ValueError: the run is not finished, wrote no model, or its summary is damaged.
        OSError: the card cannot be written.
    """
    summary = _summary(options.folder)
    folder = options.output or options.folder / RUN_MODEL
    if options.output is None and not folder.is_dir():
        raise ValueError(
            f"{folder} does not exist: with evaluation.sample_tokens=0 a run writes no model. Name a "
            "folder with --output."
        )
    folder.mkdir(parents=True, exist_ok=True)
    name = options.name or options.folder.resolve().name
    write_atomically(folder / "README.md", card(summary, name, options.license, options.language))
    print(f"wrote {folder / 'README.md'}")


def card(summary: dict[str, Any], name: str, license: str | None, language: str) -> str:
    """The model card: YAML front matter, as model hubs read it, and Markdown.

    Args:
        summary: content of the run's summary.json.
    """
    settings = from_mapping(Settings, summary["settings"])
    front = _front_matter(summary, settings, name, license, language)
    sections = [
        f"# {name}",
        _described(settings),
        "## Figures",
        _table(_figures(summary, settings)),
    ]
    sections += ["## Training", _table(_training(summary, settings)), "## Use", _USE]
    if summary["sample"]:
        sections += ["A continuation:", _quoted(summary["sample"])]
    return "\n\n".join([f"---\n{front}---", *sections]) + "\n"


def _summary(folder: Path) -> dict[str, Any]:
    file = folder / SUMMARY
    if not file.is_file():
        raise ValueError(f"{folder} is not a finished pretraining run: it has no {SUMMARY}.")
    try:
        summary = json.loads(file.read_text("utf-8"))
        missing = {"settings", "validation_loss", "sample", "versions"} - set(summary)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}).") from error
    if missing:
        raise ValueError(f"{file} is damaged: it has no {', '.join(sorted(missing))}.")
    return summary


def _front_matter(
    summary: dict[str, Any], settings: Settings, name: str, license: str | None, language: str
) -> str:
    tags = ["mor_layers"]
    tags += [] if settings.recursion is None else ["mixture-of-recursions", "looped-transformer"]
    tags += [] if settings.model.moe is None else ["mixture-of-experts"]
    loss = _loss(summary)
    metrics = [
        {"type": "loss", "name": "Held-out loss (nats per token)", "value": round(loss, 4)},
        {"type": "perplexity", "name": "Held-out perplexity", "value": round(math.exp(loss), 3)},
    ]
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"name": settings.data.path or OTHER_TEXT, "type": "text"},
        "metrics": metrics,
    }
    values = {
        "language": language,
        **({} if license is None else {"license": license}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
        "model-index": [{"name": name, "results": [result]}],
    }
    return OmegaConf.to_yaml(OmegaConf.create(values))


def _described(settings: Settings) -> str:
    model, kind = settings.model, f"A decoder of {settings.model.num_unrolled_layers} layers"
    if settings.recursions:
        parts, unshared = list[str](), 0  # layers between two recursions are both's
        for schedule in settings.schedules:
            parts += [str(unshared + schedule.prelude)] * (unshared + schedule.prelude > 0)
            parts.append(f"{schedule.block_size} × {schedule.num_recursions}")
            unshared = schedule.coda
        parts += [str(unshared)] * (unshared > 0)
        routers = ", then ".join(
            f"router {type(recursion.router).__name__}, KV policy `{recursion.kv_policy}`"
            for recursion in settings.recursions
        )
        kind = f"A recursive decoder of {' + '.join(parts)} layers ({routers})"
    if model.moe is not None:
        kind += f", with {model.moe.experts_per_token} of {model.moe.num_experts} experts per token"
    return f"{kind}, pretrained with mor_layers."


def _figures(summary: dict[str, Any], settings: Settings) -> dict[str, str]:
    loss = _loss(summary)
    found = {"Held-out loss": f"{loss:.3f} nats per token (perplexity {math.exp(loss):.2f})"}
    if summary["causal_validation_loss"] is not None:
        found["Held-out loss, routed as in training"] = f"{summary['validation_loss']:.3f}"
    found["Unigram entropy of the held-out text"] = f"{summary['unigram_entropy']:.3f}"
    found["Parameters"] = f"{summary['parameters']:,}"
    found["Training FLOPs per token"] = f"{summary['flops_per_token']:.4g}"
    found["KV bytes per token, in bf16"] = f"{Costs(settings).kv_bytes:,.0f}"
    shares = summary["causal_depth_shares"] or summary["depth_shares"]
    if shares is not None:
        found["Tokens by recursion steps, routed as in generation"] = depth_text(shares)
    return found


def _training(summary: dict[str, Any], settings: Settings) -> dict[str, str]:
    training, data = settings.training, settings.data
    tokens = training.steps * training.global_batch_size * data.sequence_length
    found = {
        "Text": data.path or OTHER_TEXT,
        "Tokens": f"{tokens:,}",
        "Steps": f"{training.steps:,} of {training.global_batch_size:,} sequences of "
        f"{data.sequence_length:,} tokens",
        "Learning rate": f"{training.learning_rate:g}, {training.warmup_steps:,} steps of warmup, "
        f"{training.decay_steps:,} of decay",
        "Precision": training.precision,
        "Seed": str(training.seed),
    }
    if summary["tokens_per_second"] is not None:
        found["Tokens per second"] = f"{summary['tokens_per_second']:,.0f}"
    versions = (f"{name} {version}" for name, version in summary["versions"].items() if version)
    return found | {"Versions": ", ".join(versions)}


def _loss(summary: dict[str, Any]) -> float:
    """Held-out loss, routed as in generation."""
    causal = summary["causal_validation_loss"]
    return summary["validation_loss"] if causal is None else causal


def _table(values: dict[str, str]) -> str:
    rows = (f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in values.items())
    return "\n".join(["| | |", "|---|---|", *rows])


def _quoted(text: str) -> str:
    """The text as an indented block, which no text can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())


_USE = """\
```python
import mor_huggingface  # registers the model class; no remote code
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")
```

`mor generate --model . "a prompt"` shows how deep each token was computed."""
