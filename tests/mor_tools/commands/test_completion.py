"""Shells complete `mor`, and do not wait for PyTorch to load."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("argcomplete", reason="comes with the extra `completion`")

REQUEST = 'exec "$0" -X importtime -m mor_tools.commands 8>&1 9>/dev/null 1>/dev/null'
"""argcomplete writes what fits to file descriptor 8."""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("mor rep", {"report"}),
        ("mor convert a b --sh", {"--sharing"}),
        ("mor convert a b --sharing mid", {"middle_cycle", "middle_sequence"}),
        ("mor pretrain --conf", {"--config"}),
    ],
)
def test_a_shell_completes_commands_options_and_choices(shell, typed, expected):
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": shell,
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": typed,
        "COMP_POINT": str(len(typed)),
    }
    done = subprocess.run(
        ["bash", "-c", REQUEST, sys.executable],
        env=os.environ | asked,
        capture_output=True,
        text=True,
    )
    # zsh and fish get descriptions behind the words.
    offered = {line.split(":")[0].split("\t")[0].strip() for line in done.stdout.splitlines()}
    assert offered == expected, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "mor_tools.commands.command_line" in imported
    assert not imported & {"torch", "rich", "mor_layers"}
