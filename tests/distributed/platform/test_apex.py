"""NVIDIA's apex is used where it is, and no other package for it (stand-ins of both)."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mor_megatron.layers.sublayers import norms
from mor_megatron.platform import has_apex
from mor_megatron.platform.apex import installed_apex
from tests.distributed.platform import apex_models
from tests.distributed.pool import WorkerPool

STAND_IN = Path(__file__).with_name("apex_stand_in")
UNRELATED = Path(__file__).with_name("unrelated_apex")


@pytest.fixture
def apex_path(monkeypatch: Any) -> Iterator[Any]:
    """Puts a folder first on the search path, for packages found from now on."""

    def use(folder: Path) -> None:
        monkeypatch.syspath_prepend(str(folder))
        installed_apex.cache_clear()
        has_apex.cache_clear()

    yield use
    monkeypatch.undo()
    installed_apex.cache_clear()
    has_apex.cache_clear()


def test_without_any_apex_nothing_is_said(apex_path: Any, tmp_path: Path) -> None:
    apex_path(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not has_apex()
    assert installed_apex() == "absent"


def test_an_unrelated_package_of_the_name_is_told_apart(apex_path: Any, monkeypatch: Any) -> None:
    apex_path(UNRELATED)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match=r"unrelated package of the same name.*pip uninstall apex"):
        assert norms.local_norm() is norms.Norm
    assert installed_apex() == "unrelated"
    assert "apex" not in sys.modules  # it was not run


def test_apex_without_its_kernels_is_not_used(apex_path: Any, tmp_path: Path) -> None:
    (tmp_path / "apex").symlink_to(STAND_IN / "apex")
    apex_path(tmp_path)
    with pytest.warns(UserWarning, match="without its CUDA extensions"):
        assert not has_apex()
    assert installed_apex() == "nvidia without kernels"


def test_fused_norms_are_taken_on_a_gpu_only(apex_path: Any, monkeypatch: Any) -> None:
    apex_path(STAND_IN)
    assert has_apex()
    assert norms.local_norm() is norms.Norm
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert norms.local_norm() is norms.FusedNorm


def losses_with_an_unrelated_apex() -> list[float]:
    assert "apex" in sys.modules  # Megatron imported it
    return apex_models.without_apex()


@pytest.mark.full
def test_an_unrelated_apex_changes_nothing(pool: WorkerPool) -> None:
    (expected,) = pool.run(apex_models.without_apex)
    beside = WorkerPool(1, search_first=[UNRELATED])
    (found,) = beside.run(losses_with_an_unrelated_apex)
    beside.close()
    assert found == expected


@pytest.mark.full
@pytest.mark.parametrize("distributed", [False, True])
def test_a_run_with_fused_norms_and_optimizer_resumes_bit_for_bit(
    pool: WorkerPool, stand_in_pool: WorkerPool, tmp_path: Path, distributed: bool
) -> None:
    (expected,) = pool.run(apex_models.without_apex)
    (found,) = stand_in_pool.run(
        apex_models.train_save_resume, directory=tmp_path, distributed=distributed
    )
    assert found["optimizer"] == "apex.optimizers.fused_adam.FusedAdam"
    assert found["norms"] == {"rms_norm"}
    assert found["first"] == pytest.approx(expected, abs=1e-5)
    assert found["resumed"] == found["undisturbed"]
    assert not found["changed"]
