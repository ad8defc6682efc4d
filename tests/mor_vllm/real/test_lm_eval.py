"""lm-evaluation-harness through vLLM scores and generates what the model does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mor_layers import MoRTransformer
from tests.mor_vllm.models import served_model
from tests.mor_vllm.real.engines import ROUGH, save_with_tokenizer

TASKS = {
    "chosen": """
task: chosen
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
""",
    "written": """
task: written
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
ROWS = [
    {"text": "the depth of a token is", "choices": ["one", "two or more"], "label": 0},
    {"text": "def route(hidden):", "choices": ["pass", "return"], "label": 1},
    {"text": "1 + 1 =", "choices": ["2", "3"], "label": 0},
]


@pytest.fixture(scope="module")
def model() -> MoRTransformer:
    return served_model("make pretrain")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval")
    save_with_tokenizer(model, folder / "model")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))


@pytest.fixture(scope="module")
def samples(folder) -> dict[str, list[dict[str, Any]]]:
    """What the harness got for each row of each task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
    results: Any = simple_evaluate(
        "vllm",
        {"pretrained": str(folder / "model"), **settings, **ROUGH},
        list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return results["samples"]


def write_tasks(folder: Path) -> None:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in source.items())
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text + lines)


@torch.no_grad()
def test_scores_of_choices_are_those_of_the_model(model, samples, tokenizer):
    def score(text: str, continuation: str) -> float:
        context, target = tokenizer.encode(text).ids, tokenizer.encode(continuation).ids
        logits = model(torch.tensor([context + target]), causal_routing=True).logits[0]
        rows = logits[len(context) - 1 : -1].log_softmax(dim=-1)
        return rows.gather(1, torch.tensor(target)[:, None]).sum().item()

    right = []
    for row, sample in zip(ROWS, samples["chosen"], strict=True):
        scores = [score(row["text"], f" {choice}") for choice in row["choices"]]
        got = [response[0] for response in sample["filtered_resps"]]
        longest = max(map(len, row["choices"])) + 1
        assert got == pytest.approx(scores, abs=1e-5 * longest)
        right.append(float(scores.index(max(scores)) == row["label"]))
    assert [sample["acc"] for sample in samples["chosen"]] == right


def test_generated_texts_are_those_of_the_model(model, samples, tokenizer):
    for row, sample in zip(ROWS, samples["written"], strict=True):
        ids = [
            int(t) for t in model.generate(torch.tensor([tokenizer.encode(row["text"]).ids]), 12)
        ]
        (got,) = sample["filtered_resps"]
        # vLLM leaves out the bytes of a character that is not complete.
        assert got == tokenizer.decode(ids).split("e")[0].rstrip("\ufffd")
