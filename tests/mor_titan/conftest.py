"""Runs only with the Python of `.ci/setup-titan`; elsewhere nothing is collected."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torchtitan") else ["test_*.py"]
