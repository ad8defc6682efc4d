"""Starts stock vLLM in its own environment and gives it work, one turn at a time."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.serving.feed import Requests, Turn
from mor_huggingface.checkpoints.llama import write_llama
from mor_layers import MoRTransformer
from mor_layers.weights import StoredModel

PROCESS = Path(__file__).with_name("vllm_process.py")


class VLLMProcess:
    """vLLM with the weights of a plain model of ours, as the Llama that they are.

    Args:
        python: of an environment that has vLLM.
        most: the largest load that will be given.
        settings: of `vllm.LLM`.

    Raises:
        RuntimeError: vLLM did not start; the error has the end of what it printed.
        ValueError: the model is none that vLLM knows by itself.
    """

    def __init__(
        self, python: str, model: MoRTransformer, most: Requests, settings: dict[str, Any]
    ) -> None:
        self._files = tempfile.TemporaryDirectory(prefix="vllm-")
        folder = Path(self._files.name)
        write_llama(StoredModel(model.config, model.state_dict()), folder)
        self._log = (folder / "log").open("w+")
        given = {
            "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
            "max_model_len": most.longest + 1,
            "max_num_seqs": most.in_flight,
            # Prompts are random, so nothing could be reused.
            "enable_prefix_caching": False,
        }
        command = [python, str(PROCESS), str(folder), json.dumps(given | settings)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        )
        self.facts: dict[str, Any] = self._answer()

    def answers(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Greedy tokens after each prompt."""
        return self._do("answers", prompts=prompts, new_tokens=new_tokens)

    def load(self, requests: Requests) -> None:
        """Begin a load in place of the one before."""
        self._do("load", **asdict(requests))

    def run(self, tokens: int) -> Turn:
        """Generate so many tokens."""
        return Turn(**self._do("run", tokens=tokens))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()
        self._files.cleanup()

    def _do(self, name: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": name} | arguments) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            end = "".join(self._log.readlines()[-30:])
            raise RuntimeError(f"vLLM's process ended with {code}. The end of its log:\n{end}")
        return json.loads(line)
