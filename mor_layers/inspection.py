"""Per-token measurements of a model on a text: depth, surprise, router scores and experts.

Depths are measured twice, because training and generation can route differently: as in generation,
where a token's depth does not depend on later tokens, and as in training. Steps of several recursions
are numbered through, from the first of the first recursion to the last of the last.

Legend: `b` batch, `n` candidates of a step, `t` tokens of the text, `w` tokens of a window, `c`
recursions, `r` steps of all of them, `e` experts.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor_layers.models import DecoderOutput, MoRTransformer
from mor_layers.recursion import RecursionBlock, RoutedStep
from mor_layers.selection import RoutingDecision


@dataclass(frozen=True)
class Inspection:
    """The measurements of a model on a text. All tensors are on the CPU."""

    ids: Int[Tensor, " t"]
    """Tokens of the text."""
    window: int
    """Number of tokens that the model saw at once. The text is cut into windows of this length."""
    steps: tuple[int, ...]
    """Number of steps of each recursion. A plain model counts as one of a single step."""
    surprise: Float[Tensor, " t"]
    """-log p of each token in nats, given the earlier tokens of its window. The first token of a
    window is predicted from the window before. NaN for the first token of the text."""
    depths_by_recursion: Int[Tensor, "c t"]
    """Number of steps that each token took in each recursion, routed as in generation."""
    training_depths_by_recursion: Int[Tensor, "c t"]
    """The same, routed as in training."""
    scores: Float[Tensor, "r t"]
    """Router score of each token at each step, routed as in generation. NaN if there is none."""
    thresholds: tuple[float | None, ...]
    """The score that a token must exceed to run each step. None: the router uses no threshold."""
    agreement: tuple[float, ...]
    """For each step, the share of its candidates in training for which generation would make the
    same decision."""
    expert_load: Float[Tensor, "r e"] | None
    """Number of tokens that each expert computed at each step, routed as in generation and summed
    over the layers of the recursion. None without experts."""

    @property
    def num_recursions(self) -> int:
        """Largest number of steps that a token can take."""
        return sum(self.steps)

    @property
    def depths(self) -> Int[Tensor, " t"]:
        """Number of steps that each token took, routed as in generation, summed over recursions."""
        return self.depths_by_recursion.sum(dim=0)

    @property
    def training_depths(self) -> Int[Tensor, " t"]:
        """The same, routed as in training."""
        return self.training_depths_by_recursion.sum(dim=0)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of tokens that ran each step, routed as in generation."""
        return self._shares(self.depths_by_recursion)

    @property
    def training_shares(self) -> tuple[float, ...]:
        """Share of tokens that ran each step, routed as in training."""
        return self._shares(self.training_depths_by_recursion)

    @property
    def depth_shares(self) -> tuple[float, ...]:
        """Share of tokens that took 0, 1, 2, ... steps in all recursions, routed as in generation."""
        return self._depth_shares(self.depths)

    @property
    def training_depth_shares(self) -> tuple[float, ...]:
        """The same, routed as in training."""
        return self._depth_shares(self.training_depths)

    @property
    def dead_shares(self) -> tuple[float, ...]:
        """For each step, the share of positions in a window at which no window's token runs it.

        Routed as in training. If the text is a single window, this is the share of tokens that do
        not run the step.
        """
        places = torch.arange(len(self.ids)) % self.window
        size = min(self.window, len(self.ids))
        deepest = torch.stack(
            [
                torch.zeros(size, dtype=torch.long).scatter_reduce(0, places, depths, "amax")
                for depths in self.training_depths_by_recursion
            ]
        )
        return tuple(1 - share for share in self._shares(deepest))

    @property
    def mean_surprise(self) -> float:
        """Mean surprise in nats per token."""
        return self.surprise[1:].mean().item()

    @property
    def surprise_correlation(self) -> float:
        """Rank correlation of a token's depth and its surprise. NaN if either is constant."""
        return rank_correlation(self.depths[1:], self.surprise[1:])

    @property
    def outlook_correlation(self) -> float:
        """Rank correlation of a token's depth and the surprise of the next token.

        The steps of a token are spent on predicting the next one.
        """
        return rank_correlation(self.depths[:-1], self.surprise[1:])

    def _shares(self, depths: Int[Tensor, "c n"]) -> tuple[float, ...]:
        """For each step, the share of depths in its recursion that reach it."""
        return tuple(
            (own > step).float().mean().item()
            for own, steps in zip(depths, self.steps, strict=True)
            for step in range(steps)
        )

    def _depth_shares(self, depths: Int[Tensor, " t"]) -> tuple[float, ...]:
        counts = depths.bincount(minlength=self.num_recursions + 1)
        return tuple((counts / len(depths)).tolist())

    @property
    def cell_shares(self) -> Float[Tensor, "r e"] | None:
        """`expert_load` of each expert, relative to the total of its step."""
        if self.expert_load is None:
            return None
        return self.expert_load / self.expert_load.sum(dim=1, keepdim=True).clamp(min=1)


def inspect_text(model: MoRTransformer, ids: Int[Tensor, " t"], window: int) -> Inspection:
    """Measure what a model does with each token of a text.

    Args:
        model: any model. Without recursion, every token takes one step.
        ids: the tokens of the text, at least 2.
        window: largest number of tokens that the model sees at once. A longer text is cut.

    Raises:
        ValueError: the text has fewer than 2 tokens, a token is not in the vocabulary, or `window`
            is below 1.
    """
    for recursion, blocks in zip(model.config.recursions, model.blocks, strict=False):
        if recursion.routes_by_layer and len(blocks) > 1:
            raise ValueError(
                "inspection shows the steps of recursions, but here each layer routes by itself. "
                "Observe the layers' RecursionBlocks instead (RecursionBlock.observed)."
            )
    if window < 1:
        raise ValueError(f"window={window} must be at least 1 token.")
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"ids has shape {tuple(ids.shape)}. Pass [t] with at least 2 tokens.")
    if not 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size:
        raise ValueError(
            f"ids are in {int(ids.min())}..{int(ids.max())}, outside the model's "
            f"vocab_size={model.config.vocab_size}. Use the tokenizer that it was trained with."
        )
    device = model.embedding.weight.device
    is_training = model.training
    model.eval()
    try:
        # A router may draw random numbers. Seeding makes the result reproducible, and fork_rng
        # leaves the caller's random state unchanged.
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            ids = ids.to(device)
            windows = [
                _look(model, ids[None, begin : begin + window], ids[begin + 1 : begin + window + 1])
                for begin in range(0, len(ids), window)
            ]
    finally:
        model.train(is_training)
    surprise = torch.cat([seen.outlook for seen in windows])
    agreeing = torch.stack([seen.agreeing for seen in windows]).sum(dim=0)  # [r 2]
    loads = [seen.expert_load for seen in windows if seen.expert_load is not None]
    return Inspection(
        ids=ids.cpu(),
        window=window,
        steps=tuple(own[0].router.num_recursions for own in model.blocks),
        surprise=torch.cat([surprise.new_full((1,), torch.nan), surprise]),
        depths_by_recursion=torch.cat([seen.depths for seen in windows], dim=1),
        training_depths_by_recursion=torch.cat([seen.training_depths for seen in windows], dim=1),
        scores=torch.cat([seen.scores for seen in windows], dim=1),
        thresholds=windows[0].thresholds,
        agreement=tuple((agreeing[:, 0] / agreeing[:, 1].clamp(min=1)).tolist()),
        expert_load=torch.stack(loads).sum(dim=0) if loads else None,
    )


def rank_correlation(values: Tensor, others: Tensor) -> float:
    """Spearman's rank correlation. Ties get their mean rank. NaN if either input is constant."""
    ranks = torch.stack([_ranks(values), _ranks(others)])
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    spread = ranks.square().sum(dim=1).prod().sqrt()
    return float(ranks.prod(dim=0).sum() / spread) if spread > 0 else float("nan")


@dataclass(frozen=True)
class _Window:
    """The measurements of one window. Fields not described here are those of `Inspection`."""

    outlook: Float[Tensor, " w"]
    """Surprise of the token after each. At the end of the text it is one shorter than `w`."""
    depths: Int[Tensor, "c w"]
    training_depths: Int[Tensor, "c w"]
    scores: Float[Tensor, "r w"]
    thresholds: tuple[float | None, ...]
    agreeing: Float[Tensor, "r 2"]
    """For each step, the number of candidates with the same decision both ways, and of all."""
    expert_load: Float[Tensor, "r e"] | None


def _look(model: MoRTransformer, ids: Int[Tensor, "1 w"], following: Int[Tensor, " w"]) -> _Window:
    # A recursion has several blocks only in a 'sequence' scheme, where all tokens run all steps, so the
    # first one represents them all.
    blocks = [own[0] for own in model.blocks]
    places = list(accumulate((len(own) for own in model.blocks), initial=0))[:-1]
    counts = [block.router.num_recursions for block in blocks]
    steps, length = sum(counts), ids.shape[1]
    firsts = list(accumulate(counts, initial=0))[:-1]
    agreeing = torch.zeros(steps, 2)
    scores = torch.full((steps, length), torch.nan)
    thresholds: list[float | None] = [None] * steps

    def compare(block: RecursionBlock, first: int, routed: RoutedStep) -> None:
        foreseen = block.router.decide(routed.logits, routed.step, routed.previous, causal=True)
        counted = _agreeing(routed.decision, foreseen, routed.previous)
        agreeing[first + routed.step] += counted

    def note(block: RecursionBlock, first: int, routed: RoutedStep) -> None:
        if routed.logits is None:
            return
        is_token = _is_token(routed.previous)
        positions = routed.previous.tokens.positions[is_token].cpu()
        for score in block.router.scores(routed.logits, routed.step):
            scores[first + score.step, positions] = score.values[is_token].float().cpu()
            thresholds[first + score.step] = score.threshold

    def run(observe: Callable[..., None], causal: bool) -> DecoderOutput:
        with ExitStack() as observing:
            for block, first in zip(blocks, firsts, strict=True):
                observing.enter_context(block.observed(partial(observe, block, first)))
            return model(ids, causal_routing=causal)

    trained, output = run(compare, causal=False), run(note, causal=True)
    load = None
    if any(output.recursions[0].expert_use):
        loads = [run.expert_load.sum(dim=1).cpu() for run in output.recursions]
        owned = zip(places, model.blocks, strict=True)
        load = torch.cat(
            [sum(loads[place + 1 : place + len(own)], loads[place]) for place, own in owned]
        )
    return _Window(
        outlook=F.cross_entropy(
            output.logits[0, : len(following)].float(), following, reduction="none"
        ).cpu(),
        depths=torch.stack([output.recursions[place].depths[:, 0].cpu() for place in places]),
        training_depths=torch.stack(
            [trained.recursions[place].depths[:, 0].cpu() for place in places]
        ),
        scores=scores,
        thresholds=tuple(thresholds),
        agreeing=agreeing,
        expert_load=load,
    )


def _agreeing(
    taken: RoutingDecision, foreseen: RoutingDecision, previous: RoutingDecision
) -> Float[Tensor, " 2"]:
    is_token = _is_token(previous)
    count = len(is_token)
    is_same = taken.is_selected(count) == foreseen.is_selected(count)
    return torch.stack([(is_same & is_token).sum(), is_token.sum()]).float().cpu()


def _is_token(decision: RoutingDecision) -> Bool[Tensor, "n b"]:
    tokens = decision.tokens
    if tokens.is_padding is not None:
        return ~tokens.is_padding
    return torch.ones_like(tokens.positions, dtype=torch.bool)


def _ranks(values: Tensor) -> Float[Tensor, " t"]:
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(dim=0).double()
    return (last - (counts.double() - 1) / 2)[place]
