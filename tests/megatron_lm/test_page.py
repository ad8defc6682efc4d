"""docs/pages/megatron_lm.md runs as printed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.megatron_lm.runs import ROOT

PAGE = (ROOT / "docs" / "pages" / "megatron_lm.md").read_text("utf-8")


def test_the_command_of_the_page_trains_with_its_files(script: Path, tmp_path: Path) -> None:
    for name, text in re.findall(r'```\w+ title="(\S+)"\n(.*?)```', PAGE, re.DOTALL):
        (tmp_path / name).write_text(text)
    assert {path.name for path in tmp_path.iterdir()} == {"recursion.yaml", "my_spec.py"}
    (tmp_path / "Megatron-LM").symlink_to(script.parent)
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    _, command = block.replace("\\\n", " ").splitlines()
    torchrun, *arguments = shlex.split(command)
    assert torchrun == "torchrun"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'integrations'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert (tmp_path / "checkpoints" / "iter_0000004").is_dir()
    assert list((tmp_path / "runs").iterdir())
    for figure in ("step 3 share", "dead positions", "sampling_accuracy", "expert imbalance"):
        assert f"| recursion {figure}: " in done.stdout
