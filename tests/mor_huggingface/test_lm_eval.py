"""lm-evaluation-harness scores and generates what the core computes with causal routing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mor_huggingface.lm_eval import MoRLM
from mor_layers import ExpertChoice, load_model, save_model
from tests.mor_layers.small_models import VOCAB_SIZE, small_config, small_model

WORDS = ["<end>", *(f"w{i}" for i in range(1, VOCAB_SIZE))]
TASK = """
task: last_word
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
  cache_dir: "{cache}"
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""
ROWS = [
    {"text": "w1 w2 w3", "choices": ["w4", "w5 w6"], "label": 0},
    {"text": "w7 w2 w9 w1 w1", "choices": ["w11", "w6"], "label": 1},
    {"text": "w12", "choices": ["w3 w3 w3", "w16"], "label": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval") / "model"
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = small_config(ExpertChoice(alpha=0.7), kv_policy="exit_state")
    save_model(small_model(config), folder)
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", model_max_length=32
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def harness(folder):
    return MoRLM(str(folder), device="cpu", batch_size=3)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


@torch.no_grad()
def score(folder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = (
        load_model(folder)
        .eval()(torch.tensor([context + continuation]), causal_routing=True)
        .logits[0, len(context) - 1 : -1]
    )
    logs = logits.log_softmax(dim=-1)
    target = torch.tensor(continuation)
    total = logs.gather(1, target[:, None]).sum().item()
    return total, bool((logits.argmax(dim=-1) == target).all())


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, own, i) for i, own in enumerate(arguments)]


def test_scores_of_continuations(folder, harness) -> None:
    pairs = [(row["text"], f" {choice}") for row in ROWS for choice in row["choices"]]
    got = harness.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (value, is_greedy) in zip(pairs, got, strict=True):
        expected, expected_greedy = score(folder, ids(context), ids(continuation))
        assert value == pytest.approx(expected, abs=1e-5)
        assert is_greedy == expected_greedy


def test_scores_of_whole_texts(folder, harness) -> None:
    texts = [(row["text"],) for row in ROWS]
    got = harness.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    for (text,), value in zip(texts, got, strict=True):
        assert value == pytest.approx(score(folder, [0], ids(text))[0], abs=1e-5)


def test_generated_texts(folder, harness) -> None:
    options = {"until": ["w5"], "max_gen_toks": 6, "do_sample": False}
    texts = [(row["text"], options) for row in ROWS]
    got = harness.generate_until(requests("generate_until", texts), disable_tqdm=True)
    model = load_model(folder).eval()
    for (text, _), answer in zip(texts, got, strict=True):
        tokens = [int(t) for t in model.generate(torch.tensor([ids(text)]), 6)]
        tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
        expected = " ".join(WORDS[t] for t in tokens).split("w5")[0]
        assert answer.strip() == expected.strip()


def task(folder) -> None:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "last_word.yaml").write_text(TASK.format(data=data, cache=folder / "cache"))


def expected_accuracy(folder) -> float:
    right = 0
    for row in ROWS:
        scores = [score(folder, ids(row["text"]), ids(choice))[0] for choice in row["choices"]]
        right += scores.index(max(scores)) == row["label"]
    return right / len(ROWS)


def test_a_local_task(folder, tmp_path) -> None:
    task(tmp_path)
    results = simple_evaluate(
        "mor",
        {"pretrained": str(folder)},
        ["last_word"],
        device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    accuracy = results["results"]["last_word"]["acc,none"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
    assert accuracy == pytest.approx(expected_accuracy(folder))


@pytest.mark.full  # the command reads thousands of task files first
def test_the_command_line_runs_a_local_task(folder, tmp_path) -> None:
    task(tmp_path)
    command = [sys.executable, "-m", "mor_huggingface.lm_eval", "run", "--model", "mor"]
    command += ["--model_args", f"pretrained={folder}", "--tasks", "last_word", "--device", "cpu"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "results")]
    offline = {f"HF_{name}_OFFLINE": "1" for name in ("HUB", "DATASETS", "EVALUATE")}
    offline |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "results").rglob("results*.json")
    accuracy = json.loads(results.read_text())["results"]["last_word"]["acc,none"]
    assert accuracy == pytest.approx(expected_accuracy(folder))


def test_another_model_is_refused(folder, monkeypatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setattr("mor_huggingface.lm_eval.MoRForCausalLM", torch.nn.Linear)
    with pytest.raises(ValueError, match="Use --model hf"):
        MoRLM(model, tokenizer=str(folder), device="cpu")
