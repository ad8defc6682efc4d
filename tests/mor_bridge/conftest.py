"""Runs only with the Python of `.ci/setup-bridge`; elsewhere nothing is collected."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("megatron.bridge") else ["test_*.py"]
