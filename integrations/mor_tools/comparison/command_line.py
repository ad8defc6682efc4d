"""From the options of `mor compare` to the comparison."""

import argparse

from mor_tools.comparison.plan import Comparison, plan


def planned(options: argparse.Namespace) -> Comparison:
    """The comparison that the options describe.

    Raises:
        ValueError: an option or a setting is wrong, or the models cannot be compared.
        FileNotFoundError: a file does not exist.
    """
    for change in options.set:
        if "=" not in change:
            raise ValueError(f"--set {change} is no key=value setting.")
    if options.processes < 1:
        raise ValueError(f"--processes {options.processes} must be at least 1.")
    return plan(
        options.configs,
        options.equal.split(","),
        seeds=options.seeds,
        output=options.output,
        changes=options.set,
        budget=options.budget,
        tolerance=options.tolerance,
    )
