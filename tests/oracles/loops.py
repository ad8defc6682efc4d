"""Slow loops that say what the fast paths must compute. Only tests import this module.

Written from the papers and sharing nothing with the rest of the package: no rectangles, no padding
slots, no masks. Each document of each sequence is taken out and treated alone, token by token.

Legend: `s` sequence, `b` batch, `k` tokens that run a step, `h` hidden, `n` query heads, `g`
key-value heads, `d` head size, `r` depths, `v` vocabulary. A token's state is `[h]`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Memory = dict[int, dict[int, tuple[Tensor, Tensor]]]
"""What a block remembers of one document while its steps run: layer -> position -> (key, value)."""


class Block(Protocol):
    """A shared block, given some tokens of one document in order."""

    def __call__(
        self, step: int, states: Float[Tensor, "k h"], positions: list[int], memory: Memory
    ) -> Float[Tensor, "k h"]: ...


@dataclass(frozen=True)
class Recursion:
    """What a recursion must give."""

    hidden: Float[Tensor, "s b h"]
    """Final states; padding keeps its own."""
    depths: Int[Tensor, "s b"]
    """Steps that each token took."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Auxiliary losses by name, summed over steps, without their coefficients."""


@dataclass(frozen=True)
class Document:
    """The tokens of one document."""

    sequence: int
    """Index in the batch."""
    positions: list[int]
    """Places in the sequence, padding left out."""


def split_documents(
    length: int,
    batch: int,
    documents: Int[Tensor, "s b"] | None = None,
    is_padding: Bool[Tensor, "s b"] | None = None,
) -> list[Document]:
    """The documents of a batch; those of nothing but padding are left out."""
    found = []
    for sequence in range(batch):
        found.append(Document(sequence, []))
        for position in range(length):
            if documents is not None and position > 0:
                number, before = documents[position, sequence], documents[position - 1, sequence]
                if number != before:
                    found.append(Document(sequence, []))
            if is_padding is None or not is_padding[position, sequence]:
                found[-1].positions.append(position)
    return [document for document in found if document.positions]


def fixed_depth(
    hidden: Float[Tensor, "s b h"],
    block: Block,
    num_recursions: int,
    documents: Int[Tensor, "s b"] | None = None,
    is_padding: Bool[Tensor, "s b"] | None = None,
) -> Recursion:
    """Every token runs every step."""
    state, depth = _Grid(hidden), torch.zeros(hidden.shape[:2], dtype=torch.long)
    for document in split_documents(len(hidden), hidden.shape[1], documents, is_padding):
        memory: Memory = {}
        for step in range(num_recursions):
            output = block(step, state.of(document), document.positions, memory)
            for i, position in enumerate(document.positions):
                state[position, document.sequence] = output[i]
                depth[position, document.sequence] += 1
    return Recursion(state.stacked(), depth)


def expert_choice(
    hidden: Float[Tensor, "s b h"],
    block: Block,
    logit: Callable[[int, Tensor], Tensor],
    capacity_factors: Sequence[float],
    activation: str = "sigmoid",
    alpha: float = 0.1,
    combine: str = "weighted",
    predictor_logit: Callable[[int, Tensor], Tensor] | None = None,
    threshold: float | None = None,
    multiple: int = 1,
    documents: Int[Tensor, "s b"] | None = None,
    is_padding: Bool[Tensor, "s b"] | None = None,
) -> Recursion:
    """Expert-choice routing (arXiv 2507.10524, section 2.2.1).

    Args:
        logit: of a step and one token's state.
        predictor_logit: of a second router that foresees the selection; None: the router itself.
        threshold: choose causally, by the predictor's probability; None: choose the largest.
        multiple: what capacities are rounded up to a multiple of.
    """
    state, depth = _Grid(hidden), torch.zeros(hidden.shape[:2], dtype=torch.long)
    found = split_documents(len(hidden), hidden.shape[1], documents, is_padding)
    memories: list[Memory] = [{} for _ in found]
    candidates = [list(document.positions) for document in found]
    sampling, z = torch.zeros(()), torch.zeros(())
    for step, factor in enumerate(capacity_factors):
        step_logits, step_predictions, step_selected = [], [], []
        for number, document in enumerate(found):
            sequence = document.sequence
            logits, predictions, weights = {}, {}, {}
            for position in candidates[number]:
                token = state[position, sequence]
                logits[position] = logit(step, token)
                predictions[position] = (
                    logits[position]
                    if predictor_logit is None
                    else predictor_logit(step, token.detach())
                )
                weights[position] = alpha * _activate(activation, logits[position])
            if threshold is None or factor == 1.0:
                capacity = max(1, math.floor(factor * len(document.positions)))
                capacity = multiple * math.ceil(capacity / multiple)
                by_weight = sorted(candidates[number], key=lambda p: -weights[p].item())
                chosen = sorted(by_weight[:capacity])
            else:
                chosen = [
                    position
                    for position in candidates[number]
                    if torch.sigmoid(predictions[position]) > threshold
                ]
            if chosen:
                states = torch.stack([state[position, sequence] for position in chosen])
                output = block(step, states, chosen, memories[number])
            for i, position in enumerate(chosen):
                gate = weights[position] if combine == "weighted" else 1.0
                state[position, sequence] = state[position, sequence] + gate * output[i]
                depth[position, sequence] += 1
            for position in candidates[number]:
                step_logits.append(logits[position])
                step_predictions.append(predictions[position])
                step_selected.append(position in chosen)
            candidates[number] = chosen
        sampling = sampling + sampling_loss(step_predictions, step_selected)
        z = z + z_loss([value[None] for value in step_logits])
    losses = {"sampling_loss": sampling, "router_z_loss": z}
    return Recursion(state.stacked(), depth, losses)


def token_choice(
    hidden: Float[Tensor, "s b h"],
    block: Block,
    logits: Callable[[Tensor], Float[Tensor, " r"]],
    num_recursions: int,
    activation: str = "softmax",
    alpha: float = 1.0,
    combine: str = "weighted",
    bias: Sequence[float] | None = None,
    documents: Int[Tensor, "s b"] | None = None,
    is_padding: Bool[Tensor, "s b"] | None = None,
) -> Recursion:
    """Token-choice routing (arXiv 2507.10524, section 2.2.1).

    Args:
        logits: of one token's state.
        bias: added to the probabilities where the depth is chosen, and only there.
    """
    state, depth = _Grid(hidden), torch.zeros(hidden.shape[:2], dtype=torch.long)
    all_logits, all_probabilities, all_depths = [], [], []
    for document in split_documents(len(hidden), hidden.shape[1], documents, is_padding):
        sequence, planned, gates, memory = document.sequence, {}, {}, {}
        for position in document.positions:
            token_logits = logits(hidden[position, sequence])
            if activation == "softmax":
                exponentials = [torch.exp(value) for value in token_logits]
                probabilities = torch.stack([e / sum(exponentials) for e in exponentials])
            else:
                probabilities = alpha * _activate(activation, token_logits)
            best = 0
            for i in range(num_recursions):
                biased = [
                    probabilities[j].item() + (0.0 if bias is None else float(bias[j]))
                    for j in (best, i)
                ]
                best = i if biased[1] > biased[0] else best
            planned[position], gates[position] = best, probabilities[best]
            all_logits.append(token_logits)
            all_probabilities.append(probabilities)
            all_depths.append(best)
        for step in range(num_recursions):
            running = [position for position in document.positions if planned[position] >= step]
            if not running:
                break
            states = torch.stack([state[position, sequence] for position in running])
            output = block(step, states, running, memory)
            for i, position in enumerate(running):
                depth[position, sequence] += 1
                if planned[position] > step:
                    state[position, sequence] = output[i]
                else:
                    gate = gates[position] if combine == "weighted" else 1.0
                    state[position, sequence] = hidden[position, sequence] + gate * output[i]
    losses = {
        "balancing_loss": balancing_loss(all_probabilities, all_depths, num_recursions),
        "router_z_loss": z_loss(all_logits),
    }
    return Recursion(state.stacked(), depth, losses)


class _Grid:
    """States of all tokens, of which one at a time is replaced."""

    def __init__(self, hidden: Float[Tensor, "s b h"]) -> None:
        self.rows = [list(row) for row in hidden]

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        return self.rows[place[0]][place[1]]

    def __setitem__(self, place: tuple[int, int], state: Tensor) -> None:
        self.rows[place[0]][place[1]] = state

    def of(self, document: Document) -> Float[Tensor, "k h"]:
        return torch.stack([self[position, document.sequence] for position in document.positions])

    def stacked(self) -> Float[Tensor, "s b h"]:
        return torch.stack([torch.stack(row) for row in self.rows])


def capacity_factor(final: float, training_steps: int, warmup_steps: int) -> float:
    """Share of tokens kept after `training_steps` of a cosine warm-up from 1."""
    if warmup_steps == 0 or training_steps >= warmup_steps:
        return final
    return final + (1 - final) * (1 + math.cos(math.pi * training_steps / warmup_steps)) / 2


def loss_free_update(bias: Sequence[float], depths: Sequence[int], rate: float) -> list[float]:
    """The bias on each depth after an optimizer step that saw tokens of these `depths`."""
    updated = []
    for i, value in enumerate(bias):
        share = Fraction(sum(depth == i for depth in depths), len(depths))
        mean = Fraction(1, len(bias))
        updated.append(value + rate * ((mean > share) - (mean < share)))
    return updated


def sampling_loss(logits: Sequence[Tensor], is_selected: Sequence[bool]) -> Tensor:
    """Mean binary cross entropy between σ(logit) and the selection; 0 of nothing."""
    total = torch.zeros((), dtype=torch.float64)
    for logit, selected in zip(logits, is_selected, strict=True):
        probability = torch.sigmoid(logit.double() if selected else -logit.double())
        total = total - torch.log(probability)
    return (total / max(1, len(logits))).float()


def balancing_loss(
    probabilities: Sequence[Float[Tensor, " r"]], depths: Sequence[int], num_depths: int
) -> Tensor:
    """Σ over depths of (mean probability) · (number of depths) · (share of tokens)."""
    count, total = max(1, len(depths)), torch.zeros(())
    for i in range(num_depths):
        mean = sum((p[i] for p in probabilities), torch.zeros(())) / count
        share = sum(depth == i for depth in depths) / count
        total = total + mean * num_depths * share
    return total


def z_loss(logits: Sequence[Float[Tensor, " r"]]) -> Tensor:
    """Mean of the squared log of the sum of exponentials."""
    total = torch.zeros((), dtype=torch.float64)
    for values in logits:
        total = total + torch.log(torch.stack([torch.exp(v.double()) for v in values]).sum()) ** 2
    return (total / max(1, len(logits))).float()


def _activate(activation: str, logit: Tensor) -> Tensor:
    if activation == "sigmoid":
        return 1 / (1 + torch.exp(-logit))
    return torch.tanh(logit) if activation == "tanh" else logit


def attention(
    query: Float[Tensor, "k n d"],
    query_positions: Sequence[int],
    key: Float[Tensor, "m g d"],
    value: Float[Tensor, "m g d"],
    key_positions: Sequence[int],
) -> Float[Tensor, "k n d"]:
    """Causal grouped-query attention within one document, query by query and head by head."""
    _, num_heads, head_size = query.shape
    group = num_heads // key.shape[1]
    rows = []
    for i, query_position in enumerate(query_positions):
        visible = [j for j, position in enumerate(key_positions) if position <= query_position]
        heads = []
        for head in range(num_heads):
            scores = [query[i, head] @ key[j, head // group] for j in visible]
            exponentials = [torch.exp(score / math.sqrt(head_size)) for score in scores]
            out = torch.zeros(head_size)
            for j, exponential in zip(visible, exponentials, strict=True):
                out = out + exponential / sum(exponentials) * value[j, head // group]
            heads.append(out)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def seen_keys(
    policy: str,
    step: int,
    layer: int,
    fresh: dict[int, tuple[Tensor, Tensor]],
    memory: Memory,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Position -> (key, value) that a step's queries see, given those its own tokens projected."""
    if policy == "recursion_wise":
        return fresh
    if step == 0:
        memory[layer] = dict(fresh)
    if policy == "recursive_sharing":
        return memory[layer]
    assert policy == "sharing_with_update"
    return memory[layer] | fresh


def decoder_block(
    weights: Mapping[str, Tensor], num_layers: int, config: Any, policy: str = "recursion_wise"
) -> Block:
    """Llama layers one after another.

    Args:
        weights: named as in the state dict of a `DecoderStack`.
        config: a `DecoderConfig`.
    """

    def run(step: int, states: Tensor, positions: list[int], memory: Memory) -> Tensor:
        for layer in range(num_layers):
            own = within(weights, f"layers.{layer}")
            states = _decoder_layer(own, config, policy, layer, step, states, positions, memory)
        return states

    return run


_PROJECTIONS = ("query", "key", "value")
_QUERY_NORM, _KEY_NORM = "attention.query_norm.weights.0", "attention.key_norm.weights.0"


def _decoder_layer(
    weights: Mapping[str, Tensor],
    config: Any,
    policy: str,
    layer: int,
    step: int,
    states: Tensor,
    positions: list[int],
    memory: Memory,
) -> Tensor:
    size, base = config.head_size, config.rope_base
    queries, fresh = [], {}
    for state, position in zip(states, positions, strict=True):
        normed = _rms_norm(state, _norm(weights, "attention_norm", step), config.rms_norm_epsilon)
        projected = [weights[f"attention.{name}.weight"] @ normed for name in _PROJECTIONS]
        if config.qkv_bias:
            biases = (weights[f"attention.{name}.bias"] for name in _PROJECTIONS)
            projected = [part + bias for part, bias in zip(projected, biases, strict=True)]
        query, key, value = (part.view(-1, size) for part in projected)
        if config.qk_norm:
            query, key = (
                torch.stack([_rms_norm(head, weights[name], config.rms_norm_epsilon) for head in x])
                for x, name in ((query, _QUERY_NORM), (key, _KEY_NORM))
            )
        queries.append(torch.stack([_rotate(head, position, base) for head in query]))
        fresh[position] = (torch.stack([_rotate(head, position, base) for head in key]), value)
    seen = seen_keys(policy, step, layer, fresh, memory)
    keys = torch.stack([key for key, _ in seen.values()])
    values = torch.stack([value for _, value in seen.values()])
    attended = attention(torch.stack(queries), positions, keys, values, list(seen))
    outputs = []
    for state, heads in zip(states, attended, strict=True):
        state = state + weights["attention.output.weight"] @ heads.flatten()
        normed = _rms_norm(state, _norm(weights, "mlp_norm", step), config.rms_norm_epsilon)
        gate, up = weights["mlp.gate.weight"] @ normed, weights["mlp.up.weight"] @ normed
        outputs.append(state + weights["mlp.down.weight"] @ (gate * torch.sigmoid(gate) * up))
    return torch.stack(outputs)


def transformer(
    config: Any,
    weights: Mapping[str, Tensor],
    ids: Int[Tensor, "b s"],
    documents: Int[Tensor, "b s"] | None = None,
    is_padding: Bool[Tensor, "b s"] | None = None,
    causal_routing: bool = False,
) -> tuple[Float[Tensor, "b s v"], Recursion | None]:
    """Logits of a `MoRTransformer`, and its recursion where tokens are routed.

    Args:
        config: a `DecoderConfig`.
        weights: named as in the model's state dict.
    """
    where = {
        "documents": None if documents is None else documents.T,
        "is_padding": None if is_padding is None else is_padding.T,
    }
    recursion = config.recursion
    steps = 1 if recursion is None else recursion.num_recursions
    sharing = "cycle" if recursion is None else recursion.sharing
    policy = "recursion_wise" if recursion is None else recursion.kv_policy
    before, after = (
        int(sharing.startswith("middle")) if given is None else given
        for given in (getattr(recursion, f"{end}_layers", None) for end in ("prelude", "coda"))
    )
    size = (config.num_unrolled_layers - before - after) // steps
    hidden = torch.stack([torch.stack([weights["embedding.weight"][i] for i in t]) for t in ids.T])
    routed = None
    if before:
        block = decoder_block(within(weights, "prelude"), before, config)
        hidden = fixed_depth(hidden, block, 1, **where).hidden
    if sharing.endswith("sequence"):
        for layer in range(size):
            block = decoder_block(within(weights, f"recursions.{layer}.layers"), 1, config)
            hidden = fixed_depth(hidden, block, steps, **where).hidden
    else:
        block = decoder_block(within(weights, "recursions.0.layers"), size, config, policy)
        router = within(weights, "recursions.0.router")
        settings = None if recursion is None else recursion.router
        routed = route(hidden, block, settings, router, steps, causal_routing, where)
        hidden = routed.hidden
    if after:
        block = decoder_block(within(weights, "coda"), after, config)
        hidden = fixed_depth(hidden, block, 1, **where).hidden
    logits = [
        torch.stack(
            [
                weights["output.weight"]
                @ _rms_norm(state, weights["norm.weights.0"], config.rms_norm_epsilon)
                for state in row
            ]
        )
        for row in hidden
    ]
    return torch.stack(logits).transpose(0, 1), routed


def route(
    hidden: Tensor,
    block: Block,
    settings: Any,
    weights: Mapping[str, Tensor],
    steps: int,
    causal: bool,
    where: dict[str, Tensor | None],
) -> Recursion:
    kind = type(settings).__name__
    if kind == "ExpertChoice":
        factors = settings.capacity_factors or [(steps - r) / steps for r in range(steps)]
        warmup, trained = settings.warmup_steps, int(weights["training_steps"])
        own = settings.predictor == "aux_loss"
        return expert_choice(
            hidden,
            block,
            lambda r, x: score(within(weights, f"scorers.{r}"), x / settings.temperature)[0],
            [capacity_factor(factor, trained, warmup) for factor in factors],
            settings.activation,
            settings.alpha,
            settings.combine,
            None if own else lambda r, x: score(within(weights, f"predictors.{r}"), x)[0],
            settings.threshold if causal else None,
            settings.capacity_multiple,
            **where,
        )
    if kind == "TokenChoice":
        return token_choice(
            hidden,
            block,
            lambda x: score(within(weights, "scorer"), x / settings.temperature),
            steps,
            settings.activation,
            settings.alpha,
            settings.combine,
            weights["depth_bias"].tolist(),
            **where,
        )
    assert settings is None or kind == "FixedDepth", f"no oracle for {kind}"
    return fixed_depth(hidden, block, steps, **where)


def score(weights: Mapping[str, Tensor], state: Float[Tensor, " h"]) -> Float[Tensor, " r"]:
    """A router's logits: one matrix, or two with GELU between."""
    values = weights["weights.0"] @ state
    if "weights.1" not in weights:
        return values
    return weights["weights.1"] @ (0.5 * values * (1 + torch.erf(values / math.sqrt(2))))


def _rms_norm(state: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return state / torch.sqrt((state * state).mean() + epsilon) * weight


def _norm(weights: Mapping[str, Tensor], name: str, step: int) -> Tensor:
    own = f"{name}.weights.{step}"
    return weights[own] if own in weights else weights[f"{name}.weights.0"]


def _rotate(head: Float[Tensor, " d"], position: int, base: float) -> Float[Tensor, " d"]:
    half = len(head) // 2
    turned = [torch.zeros(())] * len(head)
    for i in range(half):
        angle = position / base ** (i / half)
        cos, sin = math.cos(angle), math.sin(angle)
        turned[i] = head[i] * cos - head[i + half] * sin
        turned[i + half] = head[i + half] * cos + head[i] * sin
    return torch.stack(turned)


def within(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix`, named without it."""
    start = prefix + "."
    return {name[len(start) :]: w for name, w in weights.items() if name.startswith(start)}
