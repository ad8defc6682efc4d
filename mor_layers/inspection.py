"""What a model does with a text, token by token: depth, surprise, router scores, experts.

Everything is measured twice where training and generation differ: routed as in generation, where no
token's depth depends on later ones, and as in training.

Legend: `b` batch, `n` candidates of a step, `t` tokens of the text, `w` tokens of a window, `r`
recursion steps, `e` experts.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor_layers.models import MoRTransformer
from mor_layers.recursion import RecursionBlock, RoutedStep
from mor_layers.selection import RoutingDecision


@dataclass(frozen=True)
class Inspection:
    """What a model did with a text. All tensors are on the CPU."""

    ids: Int[Tensor, " t"]
    """Tokens of the text."""
    window: int
    """Tokens that the model saw at once: the text is cut into windows of so many."""
    num_recursions: int
    """Steps that a token can take."""
    surprise: Float[Tensor, " t"]
    """-log p of each token after those before it in its window (the first of a window: after the
    window before), in nats; nan for the first token of the text."""
    depths: Int[Tensor, " t"]
    """Steps each token took, routed as in generation."""
    training_depths: Int[Tensor, " t"]
    """The same, routed as in training."""
    scores: Float[Tensor, "r t"]
    """The router's score of each token for each step, as in generation; nan where it gave none."""
    thresholds: tuple[float | None, ...]
    """What a score must exceed to run a step; None where the router does not compare."""
    agreement: tuple[float, ...]
    """Of a step's candidates in training, the share about which generation would decide alike."""
    expert_load: Float[Tensor, "r e"] | None
    """Tokens that each expert computed at each step, as in generation, all layers of the recursion
    together; None without experts."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the tokens that ran each step, routed as in generation."""
        return _shares(self.depths, self.num_recursions)

    @property
    def training_shares(self) -> tuple[float, ...]:
        """The same, routed as in training."""
        return _shares(self.training_depths, self.num_recursions)

    @property
    def dead_shares(self) -> tuple[float, ...]:
        """For each step, the share of places in a window whose tokens never run it, in any window.

        Routed as in training. In a text of one window that is the share of tokens left out.
        """
        places = torch.arange(len(self.ids)) % self.window
        deepest = torch.zeros(min(self.window, len(self.ids)), dtype=torch.long)
        deepest = deepest.scatter_reduce(0, places, self.training_depths, "amax")
        return tuple((deepest <= step).float().mean().item() for step in range(self.num_recursions))

    @property
    def mean_surprise(self) -> float:
        """In nats per token."""
        return self.surprise[1:].mean().item()

    @property
    def surprise_correlation(self) -> float:
        """Rank correlation of a token's depth with how surprising it is itself; nan where either is
        the same for all."""
        return rank_correlation(self.depths[1:], self.surprise[1:])

    @property
    def outlook_correlation(self) -> float:
        """Rank correlation of a token's depth with how surprising the token after it is, which the
        depth is spent on."""
        return rank_correlation(self.depths[:-1], self.surprise[1:])

    @property
    def cell_shares(self) -> Float[Tensor, "r e"] | None:
        """`expert_load` as a share of each step's."""
        if self.expert_load is None:
            return None
        return self.expert_load / self.expert_load.sum(dim=1, keepdim=True).clamp(min=1)


def inspect_text(model: MoRTransformer, ids: Int[Tensor, " t"], window: int) -> Inspection:
    """Look at what a model does with a text.

    Args:
        model: any; one without recursion takes one step with every token.
        ids: the text's tokens, 2 or more.
        window: most tokens that the model sees at once. A longer text is cut.

    Raises:
        ValueError: there is no token to predict, a token the model does not have, or no window.
    """
    if window < 1:
        raise ValueError(f"window={window} must be at least 1 token.")
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; expected [t] with 2 tokens or more.")
    if not 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size:
        raise ValueError(
            f"ids lie in {int(ids.min())}..{int(ids.max())}, beyond the model's "
            f"vocab_size={model.config.vocab_size}. Use the tokenizer that it was trained with."
        )
    device = model.embedding.weight.device
    is_training = model.training
    model.eval()
    try:
        # A router may draw: the same text shall look the same twice, and draws of others go on.
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
        num_recursions=len(agreeing),
        surprise=torch.cat([surprise.new_full((1,), torch.nan), surprise]),
        depths=torch.cat([seen.depths for seen in windows]),
        training_depths=torch.cat([seen.training_depths for seen in windows]),
        scores=torch.cat([seen.scores for seen in windows], dim=1),
        thresholds=windows[0].thresholds,
        agreement=tuple((agreeing[:, 0] / agreeing[:, 1].clamp(min=1)).tolist()),
        expert_load=torch.stack(loads).sum(dim=0) if loads else None,
    )


def rank_correlation(values: Tensor, others: Tensor) -> float:
    """Spearman's: the correlation of ranks, ties at their mean rank; nan where one is constant."""
    ranks = torch.stack([_ranks(values), _ranks(others)])
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    spread = ranks.square().sum(dim=1).prod().sqrt()
    return float(ranks.prod(dim=0).sum() / spread) if spread > 0 else float("nan")


@dataclass(frozen=True)
class _Window:
    """What one window shows. Fields as of `Inspection`."""

    outlook: Float[Tensor, " w"]
    """Surprise of the token after each, as far as the text goes."""
    depths: Int[Tensor, " w"]
    training_depths: Int[Tensor, " w"]
    scores: Float[Tensor, "r w"]
    thresholds: tuple[float | None, ...]
    agreeing: Float[Tensor, "r 2"]
    """Candidates whose fate is the same both ways, and all candidates."""
    expert_load: Float[Tensor, "r e"] | None


def _look(model: MoRTransformer, ids: Int[Tensor, "1 w"], following: Int[Tensor, " w"]) -> _Window:
    # Several recursions are those of a sequence scheme, where all tokens run all steps.
    block = cast(RecursionBlock, model.recursions[0])
    steps, length = block.router.num_recursions, ids.shape[1]
    agreeing = torch.zeros(steps, 2)

    def compare(routed: RoutedStep) -> None:
        foreseen = block.router.decide(routed.logits, routed.step, routed.previous, causal=True)
        agreeing[routed.step] += _agreeing(routed.decision, foreseen, routed.previous)

    with block.observed(compare):
        trained = model(ids)
    scores = torch.full((steps, length), torch.nan)
    thresholds: list[float | None] = [None] * steps

    def note(routed: RoutedStep) -> None:
        if routed.logits is None:
            return
        is_token = _is_token(routed.previous)
        positions = routed.previous.tokens.positions[is_token].cpu()
        for score in block.router.scores(routed.logits, routed.step):
            scores[score.step, positions] = score.values[is_token].float().cpu()
            thresholds[score.step] = score.threshold

    with block.observed(note):
        output = model(ids, causal_routing=True)
    load = None
    if any(output.recursions[0].expert_use):
        load = sum(recursion.expert_load.sum(dim=1).cpu() for recursion in output.recursions)
    return _Window(
        outlook=F.cross_entropy(
            output.logits[0, : len(following)].float(), following, reduction="none"
        ).cpu(),
        depths=output.recursions[0].depths[:, 0].cpu(),
        training_depths=trained.recursions[0].depths[:, 0].cpu(),
        scores=scores,
        thresholds=tuple(thresholds),
        agreeing=agreeing,
        expert_load=cast(Tensor, load),
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


def _shares(depths: Int[Tensor, " t"], steps: int) -> tuple[float, ...]:
    return tuple((depths > step).float().mean().item() for step in range(steps))


def _ranks(values: Tensor) -> Float[Tensor, " t"]:
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(dim=0).double()
    return (last - (counts.double() - 1) / 2)[place]
