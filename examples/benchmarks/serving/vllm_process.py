"""Stock vLLM under the load of `feed`, in a process and an environment of its own.

`vllm_client` starts it and writes one JSON object a line to its standard input; each is answered by one
on its standard output. Between turns it sleeps on that read, with no other thread at work.

The engine runs in this process, without the server in front of it and without a process of workers: on
one core, both would only take time from it. Nothing of this library is imported.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Read by vLLM when it is imported. It binds no threads: the client has bound this process to a core.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.serving.feed import Feed, Requests


class VLLM:
    """An engine as `feed` feeds it.

    Args:
        folder: a model that vLLM knows by itself.
        settings: of `LLM`.
    """

    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        from vllm import LLM  # type: ignore[import-not-found]

        self.engine = LLM(folder, skip_tokenizer_init=True, **settings).llm_engine

    @property
    def num_running(self) -> int:
        """Requests that hold a place; none has to wait for memory."""
        return self.engine.get_num_unfinished_requests()

    def submit(self, number: int, ids: Sequence[int], new_tokens: int) -> None:
        """Take a request for exactly so many greedy tokens."""
        from vllm import SamplingParams  # type: ignore[import-not-found]
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(str(number), {"prompt_token_ids": list(ids)}, sampling)

    def step(self) -> list[int]:
        """Run one tick. Returns the numbers of requests, once for each token that they got."""
        return [number for number, _ in self._stepped()]

    def answers(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The tokens after each prompt, all in flight at once."""
        for number, ids in enumerate(prompts):
            self.submit(number, ids, new_tokens)
        texts: list[list[int]] = [[] for _ in prompts]
        while self.engine.has_unfinished_requests():
            for number, token in self._stepped():
                texts[number].append(token)
        return texts

    def abort(self, numbers: Sequence[int]) -> None:
        """Forget requests."""
        self.engine.abort_request([str(number) for number in numbers])

    def facts(self) -> dict[str, Any]:
        """What a record should say about this engine."""
        import torch
        from vllm import __version__  # type: ignore[import-not-found]

        config = self.engine.vllm_config
        return {
            "version": __version__,
            "torch": torch.__version__.partition("+")[0],
            "threads": torch.get_num_threads(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "architecture": config.model_config.architectures[0],
            "is_compiled": not config.model_config.enforce_eager,
            "cache_bytes": config.cache_config.kv_cache_memory_bytes,
            "cache_block_size": config.cache_config.block_size,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        }

    def _stepped(self) -> list[tuple[int, int]]:
        return [
            (int(output.request_id), token)
            for output in self.engine.step()
            for token in output.outputs[0].token_ids
        ]


class Served:
    """The commands of a client."""

    def __init__(self, engine: VLLM, is_gpu: bool) -> None:
        self.engine, self.feed = engine, None
        self.clock = time.perf_counter if is_gpu else time.process_time

    def facts(self) -> dict[str, Any]:
        """See `VLLM.facts`."""
        return self.engine.facts()

    def answers(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """See `VLLM.answers`."""
        return self.engine.answers(prompts, new_tokens)

    def load(self, **requests: int) -> None:
        """Begin a load, in place of the one before."""
        self.unload()
        self.feed = Feed(self.engine, Requests(**requests), self.clock)

    def unload(self) -> None:
        """Forget the requests that are in flight."""
        if self.feed is not None:
            self.engine.abort(self.feed.open)
        self.feed = None

    def run(self, tokens: int) -> dict[str, Any]:
        """Generate so many tokens."""
        assert self.feed is not None, "load first"
        return asdict(self.feed.run(tokens))


def main() -> None:
    """Answer commands until there are no more."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("settings", type=json.loads, help="of vllm.LLM")
    options = parser.parse_args()
    # Whatever vLLM prints goes to standard error; answers have the output to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    served = Served(VLLM(options.folder, options.settings), torch.cuda.is_available())
    print(json.dumps(served.facts()), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(served, command.pop("do"))(**command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
