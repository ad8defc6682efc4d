"""How the tests of the core look for counterexamples."""

from hypothesis import HealthCheck, settings

# Examples hold whole models: on a machine with other work, drawing them may take as long as it likes.
settings.register_profile(
    "core",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("core")
