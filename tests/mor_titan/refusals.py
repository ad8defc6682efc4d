"""Prints what the model says to flags of torchtitan's command line: `refusals.py FLAGS FLAGS ...`."""

import json
import sys

from mor_titan.on_cpu import enable


def main() -> None:
    """Print a list with the reason of each refusal, or None where the flags are accepted."""
    enable()
    from torchtitan.config import ConfigManager

    reasons = []
    for flags in sys.argv[1:]:
        config = ConfigManager().parse_args(
            ["--module=mor_titan", "--config=mor_debugmodel", *flags.split()]
        )
        try:
            config.model_spec.model.update_from_config(config=config)
            reasons.append(None)
        except ValueError as refusal:
            reasons.append(str(refusal))
    print(json.dumps(reasons))


if __name__ == "__main__":
    main()
