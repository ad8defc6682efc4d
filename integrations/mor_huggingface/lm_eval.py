"""lm-evaluation-harness with `--model mor`: `python -m mor_huggingface.lm_eval run --model mor ...`.

The harness looks up models in a registry and has no entry points for plugins, so this module must be
imported before the harness runs. The command `lm_eval` does not do that. In Python, import this module
and call `lm_eval.simple_evaluate(model="mor", ...)`.
"""

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from mor_huggingface.modeling import MoRForCausalLM


@register_model("mor")
class MoRLM(HFLM):
    """A model for the harness: a folder of `mor_layers.weights.folder`, or a MoRForCausalLM.

    The folder must contain a tokenizer. Tokens are routed causally, as in generation. The harness pads
    texts on the right without a mask, so with routing over the whole sequence, a score would depend on
    the other texts of the batch.

    Raises:
        ValueError: `pretrained` is another kind of model.
    """

    def __init__(self, pretrained: str | MoRForCausalLM, **options: Any) -> None:
        super().__init__(pretrained, **options)
        if not isinstance(self.model, MoRForCausalLM):
            raise ValueError(
                f"--model mor needs a MoRForCausalLM, but {pretrained} is a "
                f"{type(self.model).__name__}. Use --model hf for it."
            )


if __name__ == "__main__":
    cli_evaluate()
