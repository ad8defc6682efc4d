"""The comparison of pipeline layouts runs from the command line."""

from pathlib import Path

import pytest

import pipeline_layouts


@pytest.mark.parametrize("router", ["expert_choice", "token_choice", "fixed_depth"])
def test_layouts_are_compared_and_the_schedule_is_drawn(router, tmp_path: Path, capsys) -> None:
    picture = tmp_path / "schedule.svg"
    pipeline_layouts.main(["--router", router, "--picture", str(picture)])
    printed = capsys.readouterr().out
    assert "one_stage" in printed
    assert "steps_as_stages" in printed
    assert picture.read_text().rstrip().endswith("</svg>")


def test_settings_that_do_not_fit_say_so(capsys) -> None:
    with pytest.raises(SystemExit):
        pipeline_layouts.main(["--stages", "5"])
    assert "must be a multiple of 40" in capsys.readouterr().err
