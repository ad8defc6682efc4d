"""How the tests of the core look for counterexamples."""

from hypothesis import settings

settings.register_profile("core", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("core")
