"""What a recursion must compute under `exit_state`, loop by loop.

A token that exited shows every later step one key and value per layer, projected from the state it
keeps. That state is known only once the earlier steps have run, so the oracle runs the recursion
again and again, each time with the exits that the run before found: after as many runs as there are
steps, and one more, nothing can change any more. It is slow, and has no bookkeeping to get wrong.

Legend: `s` sequence, `b` batch, `k` tokens that run a step, `h` hidden.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles import loops as reference

Run = Callable[[Tensor, reference.Block, dict[str, Tensor | None]], reference.Recursion]
"""A recursion over one sequence `[s 1 h]`, given the block, documents and padding."""


def exit_state(
    hidden: Tensor,
    run: Run,
    weights: Mapping[str, Tensor],
    num_layers: int,
    config: Any,
    num_recursions: int,
    documents: Tensor | None = None,
    is_padding: Tensor | None = None,
) -> reference.Recursion:
    """The recursion `run` over `[s b h]` with Llama layers that see exited tokens.

    Args:
        weights: named as in the state dict of a `DecoderStack`.
        config: a `DecoderConfig`.
    """
    results = []
    for j in range(hidden.shape[1]):
        own = {
            name: None if given is None else given[:, j : j + 1]
            for name, given in (("documents", documents), ("is_padding", is_padding))
        }
        sequence = hidden[:, j : j + 1]
        found = reference.split_documents(len(sequence), 1, **own)
        document_of = {p: d.positions for d in found for p in d.positions}
        states, depths = sequence, torch.full(sequence.shape[:2], num_recursions)
        for _ in range(num_recursions + 1):
            block = _block(weights, num_layers, config, states[:, 0], depths[:, 0], document_of)
            result = run(sequence, block, own)
            states, depths = result.hidden, result.depths
        results.append(result)
    return reference.Recursion(
        torch.cat([r.hidden for r in results], dim=1), torch.cat([r.depths for r in results], dim=1)
    )


def planned(
    hidden: Tensor, block: reference.Block, depths: Tensor, where: dict[str, Tensor | None]
) -> reference.Recursion:
    """Tokens of one sequence run as many steps as `depths` `[s]` says; outputs replace states."""
    states = list(hidden[:, 0])
    for document in reference.split_documents(len(hidden), 1, **where):
        for step in range(int(depths.max())):
            running = [p for p in document.positions if depths[p] > step]
            if running:
                outputs = block(step, torch.stack([states[p] for p in running]), running, {})
                for position, output in zip(running, outputs, strict=True):
                    states[position] = output
    return reference.Recursion(torch.stack(states)[:, None], depths[:, None])


def _block(
    weights: Mapping[str, Tensor],
    num_layers: int,
    config: Any,
    final: Tensor,
    depths: Tensor,
    document_of: dict[int, list[int]],
) -> reference.Block:
    def run(step: int, states: Tensor, positions: list[int], memory: Any) -> Tensor:
        document = document_of[positions[0]]
        exited = [p for p in document if p not in positions and depths[p] <= step]
        for layer in range(num_layers):
            own = _within(weights, f"layers.{layer}.")
            rows = [(p, state, True) for p, state in zip(positions, states, strict=True)]
            rows += [(p, final[p], False) for p in exited]
            queries, keys, values = [], [], []
            for position, state, is_running in rows:
                normed = _norm(state, own["attention_norm.weights.0"], config.rms_norm_epsilon)
                keys.append(_heads(own["attention.key.weight"] @ normed, position, config))
                values.append((own["attention.value.weight"] @ normed).view(-1, config.head_size))
                if is_running:
                    query = own["attention.query.weight"] @ normed
                    queries.append(_heads(query, position, config))
            attended = reference.attention(
                torch.stack(queries),
                positions,
                torch.stack(keys),
                torch.stack(values),
                [position for position, _, _ in rows],
            )
            outputs = []
            for state, heads in zip(states, attended, strict=True):
                state = state + own["attention.output.weight"] @ heads.flatten()
                normed = _norm(state, own["mlp_norm.weights.0"], config.rms_norm_epsilon)
                gate, up = own["mlp.gate.weight"] @ normed, own["mlp.up.weight"] @ normed
                outputs.append(state + own["mlp.down.weight"] @ (gate * torch.sigmoid(gate) * up))
            states = torch.stack(outputs)
        return states

    return run


def _norm(state: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return state / torch.sqrt((state * state).mean() + epsilon) * weight


def _heads(values: Tensor, position: int, config: Any) -> Tensor:
    """`[n d]`, each head's pairs turned by the position."""
    half = config.head_size // 2
    turned = []
    for head in values.view(-1, config.head_size):
        pairs = [position / config.rope_base ** (i / half) for i in range(half)]
        cos, sin = (
            torch.tensor([math.cos(a) for a in pairs]),
            torch.tensor(list(map(math.sin, pairs))),
        )
        first, second = head[:half], head[half:]
        turned.append(torch.cat([first * cos - second * sin, second * cos + first * sin]))
    return torch.stack(turned)


def _within(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
