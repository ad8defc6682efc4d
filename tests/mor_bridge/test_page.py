"""The code of docs/pages/megatron_bridge.md runs as printed, on one CPU process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from mor_layers.weights import load_model
from tests.mor_bridge.test_folders import saved, tokenizer
from tests.mor_bridge.test_saving import DENSE

ROOT = Path(__file__).parents[2]
BEFORE = """
from mor_megatron.platform import bridge_on_cpu

bridge_on_cpu.enable()
import torch

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
"""
"""What machines with GPUs do not need."""


def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "pages" / "megatron_bridge.md").read_text("utf-8")
    # Those with a title are files for machines with GPUs.
    blocks = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    saved("dense", tmp_path)
    torch.manual_seed(0)
    LlamaForCausalLM(DENSE["llama"][1]).save_pretrained(tmp_path / "dense")
    tokenizer(tmp_path).rename(tmp_path / "dense" / "tokenizer.json")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([BEFORE, *blocks])],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "recursion step 3 share" in done.stdout
    ids = torch.arange(12)[None]
    read, exported = (load_model(tmp_path / name)(ids).logits for name in ("model", "exported"))
    assert torch.equal(read, exported)
    assert load_model(tmp_path / "recursive").config.recursion is not None
