"""What README and quickstart promise of a fresh shell in a checkout."""

import os
import subprocess
import sys

from tests.docs.test_pages import ROOT


def test_a_shell_gets_the_environment_and_the_command():
    script = f'eval "$(make -s env PYTHON={sys.executable})"; command -v python; mor --help'
    bare = {"PATH": os.defpath + ":/usr/local/bin", "HOME": os.environ["HOME"]}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=ROOT, env=bare, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    python, *rest = done.stdout.splitlines()
    assert os.path.samefile(python, sys.executable)
    assert "convert" in "\n".join(rest)
