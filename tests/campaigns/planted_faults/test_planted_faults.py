"""The list of planted faults fits the code as it is."""

import ast
from dataclasses import replace

import pytest

from tests.campaigns.planted_faults.every_fault import FAULTS
from tests.campaigns.planted_faults.fault import Fault
from tests.campaigns.planted_faults.run import ROOT, is_found, main, planted


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_can_be_planted(fault):
    changed = planted(fault, ROOT)
    if fault.file.endswith(".py"):
        ast.parse(changed)
    assert changed != (ROOT / fault.file).read_text("utf-8")
    for name in fault.tests.split():
        assert (ROOT / "tests" / name).exists(), name


def test_there_are_enough_and_no_two_alike():
    assert len(FAULTS) >= 80
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


def test_text_that_is_not_there_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    with pytest.raises(ValueError, match="has 2 places that read 'x = 1'; there must be one"):
        planted(Fault("twice", "a.py", "x = 1", "x = 2", ""), tmp_path)
    with pytest.raises(SystemExit):
        main(["--only", "no fault has this text"])


TESTS = """
import pytest, a
def test_of_every_day(): assert a.x == 1
@pytest.mark.full
def test_of_all(): assert a.y == 1
"""


def test_only_tests_of_every_day_count(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(TESTS)
    (tmp_path / "a.py").write_text("x = 1\ny = 1\n")
    fault = Fault("y is 2", "a.py", "y = 1", "y = 2", "test_a.py")
    assert not is_found(fault, tmp_path)
    assert (tmp_path / "a.py").read_text() == "x = 1\ny = 1\n"
    with pytest.raises(ValueError, match=r"test_of_all.* runs every day"):
        is_found(replace(fault, tests="test_a.py::test_of_all"), tmp_path)
