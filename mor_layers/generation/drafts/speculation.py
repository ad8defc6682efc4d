"""Speculative decoding by the model itself: a part of it drafts tokens, and all of it verifies them.

With `Speculation`, the first steps of the recursion draft. The draft of a token is read out after these
steps, with the model's own last layers, norm and head. When a few tokens are drafted, the remaining
steps run on all of them at once. What the draft computed is not computed again: keys and values of the
first steps are the same for a draft and for the full model, under every KV policy, because a step
depends on no later one.

    draft    token → steps 1..d → read out → next token → steps 1..d → read out → ...
    verify   all of these tokens together → steps d+1..N_r → read out → accept or correct

With `HeadSpeculation`, the heads of multi-token prediction draft (`head_drafts`), and the model runs on
all drafts at once, with the token before them. A round then also gives the token after the last draft.

A step of decoding costs the time to read the weights, whether one token runs it or several do, so drafts
save the time of the deep steps. The result does not depend on them: greedy decoding gives the tokens
that it gives without drafts, and sampled tokens have the same distribution.

Sources: Leviathan et al. 2023 (arXiv 2211.17192) for the rule of rejection; Zhang et al. 2023 (arXiv
2309.08168) and Elhoushi et al. 2024 (arXiv 2404.16710) for drafts from the first layers of the same
model. Here the first layers are the first steps of a recursion, so nothing has to be trained to skip.

Legend: `b` texts, `k` tokens of each in a round, `v` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from mor_layers.generation.drafts.head_drafts import HeadDrafts
from mor_layers.generation.incremental import IncrementalDecoder
from mor_layers.generation.sampling import Sampling, distribution
from mor_layers.generation.tick.in_flight import Pool, Rows
from mor_layers.models import MoRTransformer


@dataclass(frozen=True)
class Speculation:
    """How tokens are drafted."""

    draft_depth: int = 1
    """Number of steps after which a draft is read out. From 1 to one less than the model's steps."""
    num_drafts: int = 4
    """Number of tokens that are drafted before they are verified. At least 1."""

    def __post_init__(self) -> None:
        for name in ("draft_depth", "num_drafts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")


@dataclass(frozen=True)
class HeadSpeculation:
    """Tokens are drafted by the heads of multi-token prediction."""

    num_drafts: int | None = None
    """Number of tokens that are drafted before they are verified: that of the heads that are used. At
    least 1; None: all heads."""

    def __post_init__(self) -> None:
        if self.num_drafts is not None and self.num_drafts < 1:
            raise ValueError(f"num_drafts={self.num_drafts} must be at least 1.")


@dataclass
class Counts:
    """What speculation did, and what it saved."""

    drafted: int = 0
    """Tokens that were drafted and verified."""
    accepted: int = 0
    """Drafted tokens that became part of their text."""
    passes: int = 0
    """How often the shared block ran for generated tokens, on any number of tokens at once."""
    plain_passes: int = 0
    """How often it would have run for the same tokens without drafts; of several texts, for the one that
    got most."""
    token_steps: int = 0
    """Steps that tokens ran, those of rejected tokens included."""
    plain_token_steps: int = 0
    """Steps of the tokens that remained."""

    def add(
        self,
        depths: Int[Tensor, "b k"],
        num_drafts: int,
        num_accepted: Int[Tensor, " b"],
        kept: Int[Tensor, " b"],
    ) -> None:
        """Count a round: the depths of all tokens that ran, how many drafts of each text there were and
        were accepted, and how many of the tokens remained."""
        is_kept = torch.arange(depths.shape[1], device=depths.device) < kept[:, None]
        remaining = depths.where(is_kept, 0).sum(dim=1)
        self.drafted += num_drafts * len(depths)
        self.accepted += int(num_accepted.sum())
        self.token_steps += int(depths.sum())
        self.plain_token_steps += int(remaining.sum())
        self.plain_passes += int(remaining.max())

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.accepted / max(1, self.drafted)


@dataclass(frozen=True)
class Speculated:
    """Continuations of several texts."""

    tokens: list[list[int]]
    """The new tokens of each text. A stop token that ended it is the last one."""
    counts: Counts


@dataclass(frozen=True)
class _Drafts:
    """The tokens of a round before they are verified."""

    tokens: Int[Tensor, "b k"]
    """The drafted tokens. The first one follows the text, and the last one has not run itself."""
    chances: Float64[Tensor, "b k v"]
    """What each was drawn from."""
    exited: list[Rows]
    """Of the tokens that ran: those that exited by themselves."""
    paused: list[Pool]
    """Those that have run the steps of a draft and may go on."""


class SpeculativeDecoder:
    """Continues a batch of texts by drafts of the first steps, or of the model's heads.

    Args:
        model: the model. It is put into evaluation mode.
        speculation: how tokens are drafted.
        sampling: how tokens are chosen. `seed` starts the random numbers of the whole batch. Default:
            always the most likely token.

    Raises:
        ValueError: the model has no recursion whose steps a draft could leave out, or no heads, or the
            logits are changed in a way that depends on the text so far.
    """

    def __init__(
        self,
        model: MoRTransformer,
        speculation: Speculation | HeadSpeculation,
        sampling: Sampling | None = None,
    ) -> None:
        if isinstance(speculation, HeadSpeculation):
            _require_heads(model, speculation)
        else:
            _require_steps(model, speculation)
        sampling = sampling or Sampling()
        if sampling.adjusts_logits:
            raise ValueError(
                "penalties and logit_bias change what a draft was chosen from. Leave them out, or use "
                "DepthBatchingEngine, which has no drafts."
            )
        self.model, self.speculation, self.sampling = model, speculation, sampling
        self.device = model.embedding.weight.device
        self.random = torch.Generator(self.device).manual_seed(sampling.seed)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
    ) -> Speculated:
        """Continue each prompt by up to `max_new_tokens`, or until one of `stop_ids`.

        Raises:
            ValueError: a prompt is empty, or `max_new_tokens` is below 1.
        """
        if not all(prompts) or max_new_tokens < 1:
            raise ValueError(
                f"prompts of {[len(prompt) for prompt in prompts]} tokens and "
                f"max_new_tokens={max_new_tokens}: each must be at least 1."
            )
        decoder, counts = IncrementalDecoder(self.model, len(prompts)), Counts()
        heads = None
        if isinstance(self.speculation, HeadSpeculation):
            heads = HeadDrafts(self.model, len(prompts), self.num_drafts)
        texts = [[token] for token in self._begin(decoder, prompts, heads).tolist()]
        while True:
            left = [0 if text[-1] in stop_ids else max_new_tokens - len(text) for text in texts]
            if not any(left):
                return Speculated(texts, counts)
            last = torch.tensor([text[-1] for text in texts], device=self.device)
            is_open = torch.tensor(left, device=self.device) > 0
            num_drafts = min(self.num_drafts, max(left))
            if heads is None:
                found = self._round(decoder, last, is_open, num_drafts, counts)
            else:
                found = self._round_of_heads(decoder, heads, is_open, num_drafts, counts)
            for text, new, most in zip(texts, found, left, strict=True):
                new = new[:most]
                stops = [i for i, token in enumerate(new) if token in stop_ids]
                text += new[: stops[0] + 1] if stops else new

    @property
    def num_drafts(self) -> int:
        """Number of tokens that are drafted before they are verified."""
        return self.speculation.num_drafts or len(self.model.prediction_heads)

    def _begin(
        self,
        decoder: IncrementalDecoder,
        prompts: Sequence[Sequence[int]],
        heads: HeadDrafts | None,
    ) -> Tensor:
        """Run the prompts, and choose the first token of each text."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        is_token = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.zeros(is_token.shape, dtype=torch.long)
        ids[is_token] = torch.tensor([token for prompt in prompts for token in prompt])
        ids, texts = ids.to(self.device), torch.arange(len(prompts), device=self.device)
        states = decoder.extend(ids, is_token.to(self.device))
        lengths = lengths.to(self.device)
        first = self._draw(self._chances(states[texts, lengths - 1]))
        if heads is not None:
            heads.append(texts, ids, lengths, states, first)
        return first

    def _round(
        self,
        decoder: IncrementalDecoder,
        last: Int[Tensor, " b"],
        is_open: Bool[Tensor, " b"],
        num_drafts: int,
        counts: Counts,
    ) -> list[list[int]]:
        """Draft tokens after the last one of each open text, verify them, and keep what is right.

        Returns:
            The new tokens of each text: the drafts that were accepted, and then the correction of the
            first one that was not.
        """
        texts, before = is_open.nonzero()[:, 0], decoder.is_token.sum(dim=1)
        drafts = self._draft(decoder, last, is_open, num_drafts, counts)
        rows = self._run_to_the_end(decoder, drafts, counts)
        wanted = self._chances(rows.hidden).unflatten(0, (len(texts), num_drafts))  # [bk v]
        num_accepted, correction = self._verified(drafts.tokens, drafts.chances, wanted)
        # The last draft has not run itself. It does in the next round, if it was accepted.
        kept = (num_accepted + 1).clamp(max=num_drafts)
        decoder.keep(before.index_add(0, texts, kept))
        counts.add(rows.steps.view_as(drafts.tokens), num_drafts, num_accepted, kept)
        new: list[list[int]] = [[] for _ in range(len(last))]
        answers = (texts, drafts.tokens, num_accepted, correction)
        for text, tokens, count, corrected in zip(*(a.tolist() for a in answers), strict=True):
            new[text] = tokens if count == num_drafts else [*tokens[:count], corrected]
        return new

    def _round_of_heads(
        self,
        decoder: IncrementalDecoder,
        heads: HeadDrafts,
        is_open: Bool[Tensor, " b"],
        num_drafts: int,
        counts: Counts,
    ) -> list[list[int]]:
        """Draft tokens with the heads, run the model on all of them, and keep what is right.

        Returns:
            The new tokens of each text: the drafts that were accepted, and the one after them.
        """
        texts, before = is_open.nonzero()[:, 0], decoder.is_token.sum(dim=1)

        def choose(states: Float[Tensor, "o h"]) -> tuple[Tensor, Tensor]:
            chances = self._chances(states)
            return self._draw(chances), chances

        drafts, proposed = heads.draft(texts, num_drafts, choose)
        last = heads.ids[texts, heads.lengths[texts] - 1]
        run = torch.cat([last[:, None], drafts], dim=1)  # [o 1+k]
        ids = run.new_zeros(len(is_open), run.shape[1]).index_copy(0, texts, run)
        states = decoder.extend(ids, is_open[:, None].expand_as(ids))[texts]
        wanted = self._chances(states.flatten(0, 1)).unflatten(0, run.shape)
        num_accepted, following = self._verified(drafts, proposed, wanted)
        kept = num_accepted + 1
        places = before[texts, None] + torch.arange(run.shape[1], device=self.device)
        depths = decoder.depths[texts[:, None], places]
        counts.passes += int(depths.max())
        counts.add(depths, num_drafts, num_accepted, kept)
        decoder.keep(before.index_add(0, texts, kept))
        heads.append(texts, run, kept, states, following)
        new: list[list[int]] = [[] for _ in range(len(is_open))]
        answers = (texts, drafts, num_accepted, following)
        for text, tokens, count, after in zip(*(a.tolist() for a in answers), strict=True):
            new[text] = [*tokens[:count], after]
        return new

    def _draft(
        self,
        decoder: IncrementalDecoder,
        last: Int[Tensor, " b"],
        is_open: Bool[Tensor, " b"],
        num_drafts: int,
        counts: Counts,
    ) -> "_Drafts":
        """Draft tokens one by one, each read out after the first steps of the one before."""
        token, tokens, chances = last, list[Tensor](), list[Tensor]()
        exited, paused = list[Rows](), list[Pool]()
        assert isinstance(self.speculation, Speculation)
        for _ in range(num_drafts):
            entering = decoder.enter(token[:, None], is_open[:, None])
            early, pool = decoder.recur(entering, self.speculation.draft_depth)
            left_now = replace(pool.rows, hidden=decoder.cached.blocks[0].end(pool.rows.hidden))
            read = decoder.leave(Rows.joined([*early, left_now]))
            chances.append(self._chances(read.hidden))
            tokens.append(self._draw(chances[-1]))
            token = last.index_copy(0, read.slots, tokens[-1])
            exited, paused = exited + early, [*paused, pool]
            counts.passes += int(read.steps.max())
        stacked = torch.stack(tokens, dim=1), torch.stack(chances, dim=1)
        return _Drafts(*stacked, exited, paused)

    def _run_to_the_end(
        self, decoder: IncrementalDecoder, drafts: "_Drafts", counts: Counts
    ) -> Rows:
        """Run all tokens of a round through the steps that their drafts left out."""
        assert isinstance(self.speculation, Speculation)
        decoder.cached.are_alone, late = False, list[Rows]()
        if any(len(pool) for pool in drafts.paused):
            depth = self.speculation.draft_depth
            late, _ = decoder.recur(Pool.joined(depth, drafts.paused))
            counts.passes += int(late[-1].steps.max()) - depth
        return decoder.leave(Rows.joined([*drafts.exited, *late]))

    def _verified(
        self,
        given: Int[Tensor, "b k"],
        proposed: Float64[Tensor, "b k v"],
        wanted: Float64[Tensor, "b w v"],
    ) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """How many drafts of each text are accepted, and the token in place of the first that is not.

        A draft x is accepted with probability min(1, p(x)/q(x)), where q proposed it and p is wanted.
        Otherwise a token is drawn from max(0, p - q), which makes up for what q proposes too rarely.
        Where `wanted` has one entry more than there are drafts, `w = k + 1`, the token after the last
        accepted draft is drawn from it.
        """
        chosen, num_drafts = given[..., None], given.shape[1]
        ratio = (wanted[:, :num_drafts].gather(-1, chosen) / proposed.gather(-1, chosen))[..., 0]
        draw = torch.rand(
            ratio.shape, dtype=torch.float64, generator=self.random, device=self.device
        )
        is_accepted = draw < ratio
        num_accepted = is_accepted.long().cumprod(dim=1).sum(dim=1)
        at = num_accepted.clamp(max=wanted.shape[1] - 1)[:, None, None].expand(
            -1, 1, wanted.shape[-1]
        )
        proposed = F.pad(proposed, (0, 0, 0, wanted.shape[1] - num_drafts))
        rest = (wanted - proposed).clamp(min=0.0).gather(1, at)[:, 0]
        # Without any rest, p equals q, and no draft is rejected.
        rest = rest.where(rest.sum(dim=-1, keepdim=True) > 0, wanted.gather(1, at)[:, 0])
        return num_accepted, self._draw(rest)

    def _chances(self, states: Float[Tensor, "b h"]) -> Float64[Tensor, "b v"]:
        """The probability of each next token after these states."""
        return distribution(self.model.output(states), self.sampling)

    def _draw(self, chances: Float64[Tensor, "b v"]) -> Int[Tensor, " b"]:
        """A token for each row, drawn in proportion to its entries."""
        if self.sampling.temperature == 0:
            return chances.argmax(dim=-1)
        return torch.multinomial(chances, 1, generator=self.random)[:, 0]


def _require_steps(model: MoRTransformer, speculation: Speculation) -> None:
    """Raise ValueError unless the model has steps that a draft can leave out."""
    recursion = model.config.only_recursion("speculation")
    steps = 1 if recursion is None else recursion.num_recursions
    if recursion is None or len(model.recursions) > 1:
        raise ValueError(
            "drafts leave out the last steps of a block that runs several times, and this model has "
            "none: it is plain, or its layers repeat one by one. Use IncrementalDecoder."
        )
    if speculation.draft_depth >= steps:
        raise ValueError(
            f"draft_depth={speculation.draft_depth} must be below the {steps} steps of the model, "
            "so that a draft leaves some of them out."
        )


def _require_heads(model: MoRTransformer, speculation: HeadSpeculation) -> None:
    """Raise ValueError unless the model has as many heads as there are drafts."""
    heads = len(model.prediction_heads)
    if heads < (speculation.num_drafts or 1):
        raise ValueError(
            f"num_drafts={speculation.num_drafts} needs as many heads, and the model has {heads}. Train "
            "it with multi_token_prediction, or use Speculation, which drafts with the first steps."
        )
