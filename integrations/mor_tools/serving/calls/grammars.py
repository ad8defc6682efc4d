"""Grammars that a text must follow, through the library llguidance.

A grammar is a JSON schema, a regular expression, a list of choices, or a grammar in Lark's notation. The
library limits how complex a grammar may be, and never runs code of it.
"""

import functools
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mor_tools.serving.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer

try:
    import llguidance
except ImportError:  # part of the extra `serve`
    llguidance = None  # type: ignore[assignment]


class GrammarError(ValueError):
    """The grammar is invalid, or cannot be used with this model."""


class Grammars:
    """Makes constraints for a model's tokens.

    Args:
        stop_ids: the tokens that end a text, which may follow once the text is complete.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: tuple[int, ...]) -> None:
        self.tokenizer, self.vocab_size, self.stop_ids = tokenizer, vocab_size, stop_ids
        self._lock = threading.Lock()

    def constraint(self, form: Mapping[str, Any]) -> "GrammarConstraint":
        """The constraint of a new text.

        Args:
            form: one of `json` (a schema), `regex`, `choice` (a list of texts) and `grammar` (Lark).

        Raises:
            GrammarError: the grammar is invalid, or cannot be used with this model.
        """
        if llguidance is None:
            raise GrammarError(
                "structured output needs llguidance: pip install 'mor-layers[serve]'."
            )
        with self._lock:  # calls are parsed in several threads
            tokens = self._tokens
        matcher = llguidance.LLMatcher(tokens, _grammar(form), log_level=0)
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be used: {matcher.get_error()[:500]}")
        return GrammarConstraint(matcher, self.vocab_size, form)

    @functools.cached_property
    def _tokens(self) -> Any:
        if isinstance(self.tokenizer, ByteTokenizer):
            wrapper = llguidance.TokenizerWrapper(_Bytes(self.vocab_size))
            return llguidance.LLTokenizer(wrapper, eos_token=list(self.stop_ids) or None)
        if not isinstance(self.tokenizer, FileTokenizer) or not self.stop_ids:
            raise GrammarError(
                "structured output needs a model that names the token that ends a text. Set "
                "eos_token_id in its config.json."
            )
        return llguidance.LLTokenizer(
            self.tokenizer.as_json(), n_vocab=self.vocab_size, eos_token=list(self.stop_ids)
        )


class GrammarConstraint:
    """The state of one text; a `mor_layers.generation.sampling.Constraint`.

    Args:
        form: the grammar, as given to `Grammars.constraint`.
    """

    def __init__(self, matcher: Any, vocab_size: int, form: Mapping[str, Any]) -> None:
        self._matcher, self._vocab_size, self.form = matcher, vocab_size, form

    def copy(self) -> "GrammarConstraint":
        """The same state for another text."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size, self.form)

    def allowed(self) -> Tensor:
        """Which tokens may come next: bool `[v]`."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        flags = bits[:, None].bitwise_right_shift(torch.arange(8)).bitwise_and(1).flatten().bool()
        missing = self._vocab_size - len(flags)
        return pad(flags, (0, missing))  # or cut, where it is negative

    def accept(self, token: int) -> bool:
        """Add a token, and return whether the text is complete.

        Raises:
            ValueError: the token is not allowed, or the grammar is too complex to go on.
        """
        if not self._matcher.consume_token(token) or self._matcher.is_error():
            raise ValueError(
                f"the text cannot follow its grammar: {self._matcher.get_error()[:500]}"
            )
        return self._matcher.is_stopped()


class _Bytes:
    """Bytes as tokens, for the library, and one more token that ends a text and is never generated."""

    bos_token_id = None

    def __init__(self, vocab_size: int) -> None:
        self.tokens = [bytes([i % 256]) for i in range(vocab_size)] + [b"\xff<end>"]
        self.eos_token_id = vocab_size
        self.special_token_ids = [vocab_size]

    def __call__(self, text: bytes) -> Sequence[int]:
        return list(text)


def _grammar(form: Mapping[str, Any]) -> str:
    """The grammar in the library's own form."""
    ((kind, value),) = form.items()
    matcher = llguidance.LLMatcher
    if kind == "json":
        # Without whitespace that the text could be filled with.
        return matcher.grammar_from_json_schema(
            json.dumps(value), overrides={"whitespace_flexible": False}
        )
    if kind == "regex":
        return matcher.grammar_from_regex(value)
    if kind == "choice":
        return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in value))
    return matcher.grammar_from_lark(value)
