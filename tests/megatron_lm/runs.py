"""Runs of Megatron-LM's pretrain_gpt.py under torchrun, and what they print."""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.megatron_lm import by_hand

ROOT = Path(__file__).parents[2]

MODEL = {
    "num-layers": by_hand.NUM_LAYERS,
    "hidden-size": 32,
    "ffn-hidden-size": 64,
    "num-attention-heads": by_hand.NUM_HEADS,
    "seq-length": by_hand.SEQUENCE_LENGTH,
    "max-position-embeddings": by_hand.SEQUENCE_LENGTH,
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "swiglu": None,
    "disable-bias-linear": None,
    "untie-embeddings-and-output-weights": None,
    "attention-dropout": 0,
    "hidden-dropout": 0,
}
TRAINING = {
    "mock-data": None,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": by_hand.VOCAB_SIZE,
    "make-vocab-size-divisible-by": 64,  # so that two ranks do not pad it
    "micro-batch-size": by_hand.MICRO_BATCH,
    "global-batch-size": by_hand.BATCH,
    "train-iters": by_hand.STEPS,
    "lr": by_hand.LEARNING_RATE,
    "lr-decay-style": "constant",
    "eval-interval": 2,  # which must leave routers and their counts alone
    "eval-iters": 1,
    "log-interval": 1,
    "seed": by_hand.SEED,
}
MOE = {name.replace("num_moe", "num").replace("_", "-"): v for name, v in by_hand.MOE.items()}


ABSENT = object()
"""The value of an argument above that a run leaves out."""


@dataclass(frozen=True)
class Run:
    """What a run of the script left behind."""

    code: int
    output: str
    written: dict[str, list[float]]
    """What it wrote to TensorBoard of each batch, by name."""

    def logged(self, name: str) -> list[float]:
        """A figure of the log line of each batch.

        Megatron prints means since the last line, but does not begin anew after the first.
        """
        lines = [line for line in self.output.splitlines() if "consumed samples:" in line]
        found = [re.search(rf"\| {re.escape(name)}: (\S+) \|", line) for line in lines]
        assert lines and all(found), f"not in every log line: {name}\n{self.output[-4000:]}"
        first, second, *others = (float(one[1]) for one in found if one is not None)
        return [first, 2 * second - first, *others]

    @property
    def losses(self) -> list[float]:
        """Of the batches that it trained on."""
        return self.written["lm loss"]


def run(script: Path, spec: str, num_ranks: int = 1, **arguments: Any) -> Run:
    """Train with the script.

    Args:
        script: pretrain_gpt.py.
        spec: a name in tests/megatron_lm/specs.py.
        num_ranks: processes.
        **arguments: of the script; None where one takes no value. They go before those above.
    """
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    folder = tempfile.TemporaryDirectory()
    written = {"tensorboard-dir": folder.name, "tensorboard-log-interval": 1}
    given = [
        word
        for name, value in (MODEL | TRAINING | written | named).items()
        if value is not ABSENT
        for word in (f"--{name}", *([] if value is None else [str(value)]))
    ]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(num_ranks), "-m", "mor_megatron.platform.training_on_cpu"),
        *(str(script), "--spec", "tests.megatron_lm.specs", spec, *given),
    ]
    search_path = os.pathsep.join([str(ROOT), str(ROOT / "integrations")])
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    with folder:
        return Run(done.returncode, done.stdout, _written(folder.name))


def train(script: Path, spec: str, num_ranks: int = 1, **arguments: Any) -> Run:
    """The same, of a run that must come to its end."""
    done = run(script, spec, num_ranks, **arguments)
    assert done.code == 0, done.output[-6000:]
    return done


def _written(folder: str) -> dict[str, list[float]]:
    events = EventAccumulator(folder)
    events.Reload()
    return {name: [e.value for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
