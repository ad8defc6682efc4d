"""Runs only with the Python of `.ci/setup-vllm`, which has vLLM; elsewhere nothing is collected."""

import importlib.util
import os
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

# Read by vLLM when it is imported, and by the processes that it starts.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # The engine in this process: engines that follow one another import vLLM once.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@pytest.fixture(scope="session", autouse=True)
def plugin(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lets vLLM find the plugin as in an environment where the project is installed.

    Also lets others find vLLM: the command `vllm serve` and lm-evaluation-harness ask for the version
    of a package named vllm, which vllm-cpu is not.
    """
    import torch._dynamo  # takes long, and other suites read this file too

    os.environ.update(SETTINGS)
    # vLLM compiles small helpers of its own even in eager mode, which takes longer than they run.
    torch._dynamo.config.disable = True
    root = Path(__file__).parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    folder = tmp_path_factory.mktemp("installed")
    vllm = f"{version('vllm-cpu')}+cpu"
    for name, number in (("mor_layers", "0"), ("vllm", vllm)):
        installed = folder / f"{name}-{number}.dist-info"
        installed.mkdir()
        facts = f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
        (installed / "METADATA").write_text(facts)
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (folder / "mor_layers-0.dist-info" / "entry_points.txt").write_text("\n".join(lines) + "\n")
    added = [str(folder), str(root), str(root / "integrations")]
    sys.path[:0] = added
    os.environ["PYTHONPATH"] = os.pathsep.join(added)
