"""vLLM engines on folders of ours, and what their answers are compared with."""

import gc
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor_layers import MoRTransformer, save_model

# Several things that must change nothing at once: prompts are computed in pieces beside single tokens
# of other requests, rows of common beginnings are taken from the cache, and the cache is so small that
# requests lose their rows and are computed anew.
ROUGH = {
    "max_num_batched_tokens": 96,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "block_size": 32,
    "num_gpu_blocks_override": 40,
}

_START = 300
"""Seconds that a server may take until it answers."""
END = 256
"""The token that ends a text."""


@dataclass(frozen=True)
class Compared:
    """Answers of vLLM beside those of the model."""

    requests: int
    tokens: int
    other_choices: int
    """Greedy tokens that are not ours."""
    largest: float
    """Largest difference of a logprob."""
    depths: frozenset[int]
    """Steps that tokens took."""

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {self.tokens} tokens, {self.other_choices} chosen otherwise, "
            f"largest difference of logprobs {self.largest:.1e}"
        )


@contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[Any]:
    """An `LLM`, ended afterwards so that the next can begin."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    given = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 64,
        "kv_cache_memory_bytes": 2**27,
        "disable_log_stats": False,
    }
    llm = LLM(str(folder), **(given | settings))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers, on a machine that may be busy."""
    for _ in range(_START):
        assert server.poll() is None, f"the server ended with {server.returncode}"
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server did not answer within {_START} seconds")


def save_with_tokenizer(model: MoRTransformer, folder: Path) -> None:
    """The model, and a tokenizer whose tokens are bytes, and `END`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    save_model(model, folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<|end|>"])}
    assert vocabulary["<|end|>"] == END
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


def mixed_prompts(count: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 80 tokens, every fourth with the beginning of the one before."""
    generator = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = []
    for number in range(count):
        length = int(torch.randint(1, 81, (1,), generator=generator))
        ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        if number % 4 == 3:
            ids = prompts[-1] + ids
        prompts.append(ids[:100])
    return prompts


def greedy(llm: Any, prompts: Sequence[Sequence[int]], max_tokens: int = 20) -> list[Any]:
    """Greedy answers to all prompts, in flight together, with logprobs."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, logprobs=3, ignore_eos=True, detokenize=False
    )
    given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return llm.generate(given, sampling, use_tqdm=False)


@torch.no_grad()
def compare(model: MoRTransformer, answers: Sequence[Any]) -> Compared:
    """Each answer beside one pass of the model over prompt and answer."""
    tokens, others, largest, depths = 0, 0, 0.0, set()
    for answer in answers:
        prompt, completion = answer.prompt_token_ids, answer.outputs[0]
        ids = list(completion.token_ids)
        output = model(torch.tensor([[*prompt, *ids]]), causal_routing=True)
        rows = output.logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=-1)
        depths |= set(output.depths.flatten().tolist())
        others += int((rows.argmax(dim=-1) != torch.tensor(ids)).sum())
        tokens += len(ids)
        largest = max(
            largest, *(_difference(*pair) for pair in zip(rows, completion.logprobs, strict=True))
        )
    return Compared(len(answers), tokens, others, largest, frozenset(depths))


def _difference(ours: Tensor, theirs: dict[int, Any]) -> float:
    return max(abs(float(ours[token]) - entry.logprob) for token, entry in theirs.items())


def counted(llm: Any, name: str) -> int:
    """A counter of vLLM's."""
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == f"vllm:{name}")
