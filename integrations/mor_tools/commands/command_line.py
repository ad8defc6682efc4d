"""What `mor` accepts: the summary and the options of each subcommand.

Help and the completion of a shell need these and nothing else, so this module imports no library that
takes seconds to load. It repeats names of other packages, and a test checks that they are the same.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor_tools.comparison.options import add_arguments as compare_options

FORMATS = (
    "deepseek_v2",
    "deepseek_v3",
    "huginn",
    "llama",
    "megatron",
    "mor",
    "nanbeige",
    "ouro",
    "published",
)
HARDWARE = ("a100", "h100", "b200", "cpu")
INITIALIZATIONS = ("stepwise", "average", "lower", "upper", "random")
SHARING_SCHEMES = ("cycle", "sequence", "middle_cycle", "middle_sequence")
_TRUST_REMOTE_CODE = (
    "let the model name a router of its own, whose module is imported and so runs; use it only "
    "for models whose origin you trust"
)


@dataclass(frozen=True)
class Interface:
    """How a subcommand is called."""

    summary: str
    """One sentence for `mor --help`."""
    module: str
    """The module of this package that does the work, in a function `run(options)`."""
    add_options: Callable[[argparse.ArgumentParser], None]
    """Define the options."""


def _card(options: argparse.ArgumentParser) -> None:
    add = options.add_argument
    add("folder", type=Path, help="folder of a finished pretraining run")
    add("--name", help="name of the model (default: that of the folder)")
    add("--license", help="identifier of the licence, such as apache-2.0 (default: none is stated)")
    add("--language", default="en", help="language of the text (default: en)")
    add("--output", type=Path, help="folder to write README.md into (default: RUN/model)")


def _convert(options: argparse.ArgumentParser) -> None:
    add = options.add_argument
    add("source", type=Path, help="a model: a folder, a training run, or NAME.json of a pair")
    add("target", type=Path, help="folder to write; must not exist")
    add("--to", choices=FORMATS, default="mor", help="format to write (default: mor)")
    add(
        "--settings",
        type=Path,
        help="YAML of the DecoderConfig, for a Megatron checkpoint that does not hold it",
    )
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare logits of both sides, one in memory at a time (default: yes)",
    )
    add("--trust-remote-code", action="store_true", help=_TRUST_REMOTE_CODE)
    add(
        "--recursions",
        type=int,
        help="make a dense model recursive, with this number of recursions",
    )
    for name, settings in WITH_RECURSIONS.items():
        add(flag(name), **settings)


def _generate(options: argparse.ArgumentParser) -> None:
    add = options.add_argument
    add("prompt", nargs="?", default="Once upon a time", help="text to continue")
    add("--model", help="model folder written by pretraining or `mor convert`; default: random")
    add("--trust-remote-code", action="store_true", help=_TRUST_REMOTE_CODE)
    add("--max-new-tokens", type=int, default=100, help="(default: 100)")
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    add("--top-k", type=int, default=0, help="sample among this many tokens; 0: all (default)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the top tokens with this total probability (default: 1)",
    )
    add("--seed", type=int, default=0, help="seed of the random numbers (default: 0)")
    add(
        "--stop",
        action="append",
        default=[],
        help="string at which generation stops; may be repeated",
    )
    _eight_bits(options)
    add("--calibrate", metavar="FILE", help="held-out text to set thresholds from")
    add("--dial", type=float, default=1.0, help="compute relative to training; needs --calibrate")
    add("--extra-steps", type=int, default=0, help="recursion steps beyond those of training")


def _inspect(options: argparse.ArgumentParser) -> None:
    add = options.add_argument
    add("checkpoint", type=Path, help="folder of a model, or of the run that trained it")
    add("--text", type=Path, required=True, help="UTF-8 text to inspect")
    add("--output", type=Path, help="page to write (default: inspection.html in the folder)")
    add("--trust-remote-code", action="store_true", help=_TRUST_REMOTE_CODE)
    add("--window", type=int, help="largest number of tokens at once (default: as in training)")
    add("--tensorboard", type=Path, metavar="DIR", help="also write figures for TensorBoard")
    add("--wandb", metavar="PROJECT", help="also send figures to this project of Weights & Biases")
    add(
        "--wandb-offline",
        action="store_true",
        help="store the figures beside the page, for `wandb sync`",
    )


def _pretrain(options: argparse.ArgumentParser) -> None:
    add = options.add_argument
    add("--processes", type=int, help="processes on this machine (default: one per GPU, or 1)")
    add("--config", type=Path, metavar="FILE", help="YAML file of settings")
    add("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    add("--list-settings", action="store_true", help="explain every setting and exit")


def _plan(options: argparse.ArgumentParser) -> None:
    add = options.add_argument
    add("config", type=Path, help="YAML file of a pretraining run")
    add("--gpus", type=int, required=True, help="devices")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    add("--hardware", default="h100", help=f"one of {', '.join(HARDWARE)} (default: h100)")
    add("--tflops", type=float, help="peak of a device in TFLOP/s at the training precision")
    add("--memory-gib", type=float, help="memory of a device in GiB")
    add("--intra-gbps", type=float, help="bandwidth of a device within its node in 1e9 bytes/s")
    add("--inter-gbps", type=float, help="bandwidth of a device to other nodes in 1e9 bytes/s")
    add("--per-node", type=int, help="devices per node")
    add(
        "--efficiency",
        type=float,
        default=0.5,
        help="fraction of the peak that is reached (default: 0.5)",
    )
    add("--micro-batch-sizes", help="e.g. 1,2,4 (default: the file's, half and double of it)")
    add("--recompute", help="e.g. none,full (default: the file's)")
    add("--vocab-size", type=int, help="vocabulary size, instead of the tokenizer's")
    add("--top", type=int, default=10, help="number of layouts to show (default: 10)")
    add("--inference", action="store_true", help="instead, how many sequences fit while generating")
    add("--json", type=Path, metavar="FILE", help="write every layout that fits to a file")
    add("--picture", type=Path, metavar="FILE", help="draw memory and time of the best layout")


def _recipes(options: argparse.ArgumentParser) -> None:
    add = options.add_argument
    add("name", nargs="?", help="the recipe to print (default: list them)")
    add("--tiny", action="store_true", help="its tiny twin, for a first try")
    add("--output", type=Path, help="file to write it into, instead of printing")


def _report(options: argparse.ArgumentParser) -> None:
    add = options.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="folder of a pretraining run")
    add("--output", type=Path, help="page to write (default: comparison.html)")


def _serve(options: argparse.ArgumentParser) -> None:
    add = options.add_argument
    add("--model", help="model folder written by pretraining or `mor convert`; default: random")
    add("--trust-remote-code", action="store_true", help=_TRUST_REMOTE_CODE)
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    add("--device", default="cpu", help="device to run on, as PyTorch names it (default: cpu)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    add("--replicas", type=int, default=1, help="copies of the model, in processes (default: 1)")
    add(
        "--tensor-parallel",
        type=int,
        default=1,
        help="processes over which each copy is sharded (default: 1)",
    )
    add(
        "--kv-mib", type=float, default=256, help="memory for keys and values in MiB (default: 256)"
    )
    _eight_bits(options)
    add(
        "--prefix-sharing",
        choices=("client", "all", "off"),
        default="client",
        help="which requests share the keys and values of a common prefix: those of one client "
        "(default), all, or none. With all, clients can find out by timing what others have sent",
    )
    add("--slots", type=int, default=64, help="sequences in flight (default: 64)")
    add(
        "--max-length",
        type=int,
        default=2048,
        help="longest prompt plus continuation in tokens (default: 2048)",
    )
    add("--chunk-size", type=int, default=64, help="prompt tokens processed at once (default: 64)")
    add(
        "--compiler",
        choices=("inductor", "aot_eager", "eager"),
        help="backend of torch.compile for a whole tick as one graph, which is compiled before the "
        "server listens; default: no graph",
    )
    add("--max-tokens", type=int, default=512, help="largest max_tokens of a call (default: 512)")
    add(
        "--max-waiting",
        type=int,
        default=256,
        help="calls that may wait; more get 429 (default: 256)",
    )
    add("--max-per-client", type=int, default=64, help="waiting calls of one client (default: 64)")
    add(
        "--allowed-host",
        action="append",
        default=[],
        help="further host name of the server; may be repeated",
    )
    add(
        "--api-key", action="append", default=[], help="key that callers must send; may be repeated"
    )
    add("--api-key-file", help="file with one API key per line, which `ps` does not show")
    add("--timeout", type=float, default=120, help="seconds that a call may take (default: 120)")
    add("--grace", type=int, default=10, help="seconds to finish calls at shutdown (default: 10)")


def _eight_bits(options: argparse.ArgumentParser) -> None:
    add = options.add_mutually_exclusive_group().add_argument
    add("--int8-kv", action="store_true", help="keep keys and values as 8-bit integers; not exact")
    add("--fp8-kv", action="store_true", help="keep them as 8-bit floating point; not exact")


def flag(name: str) -> str:
    """The option of a name."""
    return "--" + name.replace("_", "-")


WITH_RECURSIONS: dict[str, dict[str, Any]] = {
    "sharing": {"choices": SHARING_SCHEMES, "help": "sharing scheme (default: middle_cycle)"},
    "prelude": {
        "type": int,
        "help": "unshared layers before the recursion (default: 1 or 0, depending on --sharing)",
    },
    "coda": {"type": int, "help": "unshared layers after the recursion (default: likewise)"},
    "init": {
        "choices": INITIALIZATIONS,
        "help": "how shared weights are initialised (default: average)",
    },
    "router": {"help": "type of the router (default: fixed_depth)"},
    "seed": {"type": int, "help": "seed of random weights and of a router (default: 0)"},
    "relax_rank": {
        "type": int,
        "help": "rank of low-rank deltas for each step, which then also has norms of its own",
    },
    "own_per_step": {
        "nargs": "+",
        "choices": ("attention", "mlp"),
        "help": "sublayers of which each step keeps those of the layers at its depth, with their norms",
    },
    "relax_kind": {"choices": ("lora", "dora"), "help": "kind of the deltas (default: lora)"},
    "repeat": {
        "action": "store_true",
        "default": None,
        "help": "keep all layers and repeat those between --prelude and --coda, without training",
    },
    "damping": {
        "type": float,
        "help": "with --repeat: how far a loop moves the state, in (0, 1] (default: 1 / recursions)",
    },
}
"""Options that only apply to a model that is made recursive."""

COMMANDS = {
    "card": Interface(
        "Write the model card of a finished pretraining run, ready for a model hub.", "card", _card
    ),
    "compare": Interface(
        "Compare configurations fairly: train each on the same text with several seeds, at equal "
        "cost.",
        "compare",
        compare_options,
    ),
    "convert": Interface(
        "Convert models between Hugging Face, ours, published MoR and Megatron; make dense ones "
        "recursive.",
        "convert",
        _convert,
    ),
    "generate": Interface(
        "Continue a text and show how deep each token was computed, in colour.",
        "generate",
        _generate,
    ),
    "inspect": Interface(
        "Show what a model does with a text, token by token, on one HTML page.",
        "inspection",
        _inspect,
    ),
    "plan": Interface(
        "Plan a training run: which parallel layouts fit, and how long a step should take.",
        "plan",
        _plan,
    ),
    "pretrain": Interface(
        "Pretrain a model on this machine, or resume its run, with Megatron-Core.",
        "pretrain",
        _pretrain,
    ),
    "recipes": Interface(
        "List recipes of models to start from, or print one.", "recipes", _recipes
    ),
    "report": Interface(
        "Compare pretraining runs on one HTML page: losses, speed and settings that differ.",
        "report",
        _report,
    ),
    "serve": Interface(
        "Serve a model over HTTP, in OpenAI's protocols for completions and for chat.",
        "serve",
        _serve,
    ),
}
"""The subcommands by name. A summary repeats the first sentence of its module's docstring."""
