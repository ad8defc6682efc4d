"""Patterns of hybrid models with recursions in them: `*-[*-*E]x3*-`.

Megatron writes the layers of a HybridModel as a string with one symbol for each sublayer, and `|`
between pipeline stages. Here, brackets enclose a recursion block, and `xN` after them says how many
times it runs.
"""

import re
from dataclasses import dataclass
from itertools import groupby

SYMBOLS = {
    "*": "attention",
    "-": "MLP",
    "E": "mixture of experts",
    "M": "Mamba",
    "G": "gated delta net",
    "D": "sparse attention",
    "+": "latent attention",
}
"""Megatron's symbols for layers."""
SCANS = "MG"
"""Those whose state passes from each token to the next one."""
_TOKEN = re.compile(r"(?P<space>\s+)|\[(?P<block>[^\[\]]*)\](?P<times>x[0-9]+)?|(?P<one>.)")


@dataclass(frozen=True)
class PatternPart:
    """Consecutive layers that no pipeline stage may split."""

    symbols: str
    """One symbol per layer; for a recursion, the symbols of one step."""
    num_recursions: int | None = None
    """How many times the layers run; None: not a recursion."""

    @property
    def unrolled(self) -> str:
        """One symbol for each layer that runs."""
        return self.symbols * (self.num_recursions or 1)

    @property
    def layers(self) -> list[str]:
        """The symbols of a recursion, grouped into layers: an attention and what follows it."""
        return re.findall(r"\*[-E]?", self.symbols)

    def __str__(self) -> str:
        repeats = self.num_recursions
        return self.symbols if repeats is None else f"[{self.symbols}]x{repeats}"


@dataclass(frozen=True)
class HybridPattern:
    """The layers of a hybrid model, by pipeline stage. `str()` returns the written form."""

    stages: tuple[tuple[PatternPart, ...], ...]
    """One part for each layer outside recursions, and one for each recursion."""

    @classmethod
    def parse(cls, text: str) -> "HybridPattern":
        """Parse a pattern such as `*-[*-*E]x3*-`; spaces are allowed between symbols.

        Raises:
            ValueError: the pattern is invalid; the message says where, and what is allowed.
        """
        stages: list[list[PatternPart]] = [[]]
        for match in _TOKEN.finditer(text):
            if match["space"]:
                continue
            if match["block"] is not None:
                stages[-1].append(_recursion(text, match))
            elif match["one"] == "|":
                stages.append([])
            else:
                stages[-1].append(PatternPart(_symbol(text, match)))
        if not all(stages):
            raise ValueError(
                f"pattern {text!r} has a stage without layers. Write at least one symbol "
                "before, between and after '|'."
            )
        return cls(tuple(map(tuple, stages)))

    @property
    def parts(self) -> tuple[PatternPart, ...]:
        """The parts of all stages."""
        return tuple(part for stage in self.stages for part in stage)

    @property
    def recursions(self) -> tuple[PatternPart, ...]:
        """The recursion blocks, in order."""
        return tuple(part for part in self.parts if part.num_recursions is not None)

    @property
    def unrolled(self) -> str:
        """Megatron's own pattern of the same depth: the `hybrid_layer_pattern` of a HybridModel."""
        return "|".join("".join(part.unrolled for part in stage) for stage in self.stages)

    @property
    def num_layers(self) -> int:
        """`config.num_layers` of the model, which is the number of unrolled symbols."""
        return sum(len(part.unrolled) for part in self.parts)

    def __str__(self) -> str:
        return "|".join("".join(map(str, stage)) for stage in self.stages)


def _recursion(text: str, match: re.Match[str]) -> PatternPart:
    where = f"pattern {text!r}: the recursion {match[0]!r} at {match.start()}"
    symbols = re.sub(r"\s", "", match["block"])
    if match["times"] is None:
        raise ValueError(
            f"{where} does not say how often it runs. Write for example [{symbols}]x3."
        )
    if int(match["times"][1:]) < 1:
        raise ValueError(f"{where} must run at least once. Write x1 or more.")
    if "|" in symbols:
        raise ValueError(f"{where} would be split by a stage. Write '|' before or after it.")
    if not re.fullmatch(r"(\*[-E]?)+", symbols):
        kinds = ", ".join(
            SYMBOLS.get(symbol, repr(symbol)) for symbol, _ in groupby(sorted(symbols))
        )
        if set(symbols) & set(SCANS):
            raise ValueError(
                f"{where} contains {kinds}. The state of a Mamba or gated delta net passes from each "
                "token to the next one, and a token that skips a step would leave a gap in that step's "
                "state. At a fixed depth no token skips, but Megatron's layers need kernels of a GPU "
                "(mamba_ssm, flash-linear-attention), on which this has not been verified. Write them "
                "before or after the recursion, as in M-[*-]x3M-."
            )
        raise ValueError(
            f"{where} contains {kinds or 'nothing'}. A recursion runs layers of attention, each "
            "alone or followed by an MLP or experts: '*', '*-' or '*E', as in [*-*E]x3."
        )
    return PatternPart(symbols, int(match["times"][1:]))


def _symbol(text: str, match: re.Match[str]) -> str:
    symbol, where = match["one"], f"pattern {text!r}: {match['one']!r} at {match.start()}"
    if symbol in "[]":
        raise ValueError(
            f"{where} has no matching bracket. Recursions are written [*-]x3, and cannot be nested."
        )
    if symbol == "/":
        raise ValueError(
            f"{where} begins multi-token prediction, which a recursion does not support. Leave it "
            "out."
        )
    if symbol not in SYMBOLS:
        known = ", ".join(f"{symbol} ({name})" for symbol, name in SYMBOLS.items())
        raise ValueError(
            f"{where} is not a layer. Use {known}; '|' between stages; [...]xN for a recursion."
        )
    return symbol
