"""lm-evaluation-harness with `--model mor`: `python -m mor_huggingface.lm_eval run --model mor ...`.

The harness finds models by a table of its own and has no entry points for others, so a bare `lm_eval`
cannot know this one: a registration must be imported first. From Python, import this module and call
`lm_eval.simple_evaluate(model="mor", ...)`.
"""

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from mor_huggingface.modeling import MoRForCausalLM


@register_model("mor")
class MoRLM(HFLM):
    """A folder of `mor_layers.weights.folder` with a tokenizer, or a MoRForCausalLM.

    Tokens are routed causally, as in generation: the harness pads on the right without a mask, and a
    score that looked at the whole sequence would depend on its neighbours in the batch.

    Raises:
        ValueError: `pretrained` is another kind of model.
    """

    def __init__(self, pretrained: str | MoRForCausalLM, **options: Any) -> None:
        super().__init__(pretrained, **options)
        if not isinstance(self.model, MoRForCausalLM):
            raise ValueError(
                f"--model mor evaluates a MoRForCausalLM, and {pretrained} is a "
                f"{type(self.model).__name__}. Use --model hf for it."
            )


if __name__ == "__main__":
    cli_evaluate()
