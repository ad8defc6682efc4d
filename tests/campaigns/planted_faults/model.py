"""Faults of what attention sees, of experts and deltas, and of the decoder."""

from tests.campaigns.planted_faults.fault import CORE, Fault

POLICIES = "mor_layers/recursion"
MOE = "mor_layers/layers/test_moe.py"
MODEL = "mor_layers/models/test_transformer.py"
RELAXATION = "mor_layers/layers/test_relaxation.py"

MODEL_FAULTS = [
    # What attention sees.
    Fault(
        "a query sees the next token",
        CORE + "recursion/attention.py",
        "mask = k <= q",
        "mask = k <= q + 1",
        POLICIES,
    ),
    Fault(
        "documents see one another",
        CORE + "recursion/attention.py",
        "queries.documents.T[:, :, None] == keys.documents.T[:, None, :]",
        "queries.documents.T[:, :, None] >= keys.documents.T[:, None, :]",
        POLICIES,
    ),
    Fault(
        "padding is seen",
        CORE + "recursion/attention.py",
        "mask = mask & ~keys.is_padding.T[:, None, :]",
        "mask = mask & (keys.is_padding | True).T[:, None, :]",
        POLICIES,
    ),
    Fault(
        "sharing projects keys again at every step",
        CORE + "recursion/kv_policies.py",
        "            self.store[layer] = (key, value)\n        return self.store[layer]",
        "            self.store[layer] = (key, value)\n        return self.store[0]",
        POLICIES + f" {MODEL}",
    ),
    Fault(
        "an update is carried on to later steps",
        CORE + "recursion/kv_policies.py",
        "        return self._update(shared_key, key), self._update(shared_value, value)",
        "        self.store[layer] = self._update(shared_key, key), self._update(shared_value, value)\n"
        "        return self.store[layer]",
        POLICIES + f" {MODEL} test_reference.py",
    ),
    Fault(
        "an update writes padding",
        CORE + "recursion/kv_policies.py",
        "fresh = torch.where(is_padding, take_rows(shared, rows), fresh)",
        "fresh = fresh",
        POLICIES + f" {MODEL}",
    ),
    Fault(
        "exit-state forgets who exited first",
        CORE + "recursion/kv_policies.py",
        "rows += [self.store[layer, entry] for entry in range(last + 1)]",
        "rows += [self.store[layer, last] for entry in range(last + 1)]",
        POLICIES,
    ),
    Fault(
        "a step embedding is the one before",
        CORE + "recursion/step_input.py",
        "self.embeddings(step)",
        "self.embeddings(max(0, step - 1))",
        "mor_layers/recursion",
    ),
    Fault(
        "an unrolled cycle runs as a sequence",
        CORE + "recursion/sharing.py",
        "shared = [self.prelude + layer for _ in steps for layer in size]",
        "shared = [self.prelude + layer for layer in size for _ in steps]",
        "mor_layers/recursion/test_sharing.py",
    ),
    # Experts and deltas.
    Fault(
        "gates of experts are not renormalised",
        CORE + "layers/moe/router.py",
        "gates = taken / taken.sum(dim=-1, keepdim=True).clamp(min=1e-20)",
        "gates = taken",
        MOE,
    ),
    Fault(
        "padding goes to experts",
        CORE + "layers/moe/router.py",
        "is_wanted &= ~is_padding[:, None]",
        "is_wanted &= ~is_padding[:, None] | True",
        MOE,
    ),
    Fault(
        "experts' capacity rounds down",
        CORE + "layers/moe/router.py",
        "num_experts * factor).ceil()",
        "num_experts * factor).floor()",
        MOE,
    ),
    Fault(
        "a token without probability keeps its place",
        CORE + "layers/moe/router.py",
        "order = chosen.detach().flatten().sort(descending=True, stable=True).indices",
        "order = chosen.detach().flatten().sort(descending=False, stable=True).indices",
        MOE,
    ),
    Fault(
        "the bias over experts enters the gates",
        CORE + "layers/moe/router.py",
        "chosen = probabilities.gather(-1, experts)",
        "chosen = ranking.gather(-1, experts)",
        MOE,
    ),
    Fault(
        "experts' losses are not shared out over steps",
        CORE + "layers/moe/router.py",
        "weights[n] / self.num_steps * loss",
        "weights[n] * loss",
        MOE,
    ),
    Fault(
        "gate and up of an expert are swapped",
        CORE + "layers/moe/experts.py",
        "F.linear(F.silu(F.linear(group, gate)) * F.linear(group, up), down)",
        "F.linear(F.silu(F.linear(group, up)) * F.linear(group, gate), down)",
        MOE,
    ),
    Fault(
        "a delta ignores its scale",
        CORE + "layers/relaxation.py",
        "relaxed = projected + self.scale * F.linear",
        "relaxed = projected + F.linear",
        RELAXATION,
    ),
    Fault(
        "the norm of a DoRA delta has a gradient",
        CORE + "layers/relaxation.py",
        "    @torch.no_grad()\n    def norms(",
        "    def norms(",
        RELAXATION,
    ),
    Fault(
        "the rank of a delta is not capped",
        CORE + "layers/relaxation.py",
        "return min(self.rank, into, out)",
        "return self.rank",
        RELAXATION,
    ),
    # The model.
    Fault(
        "keys are not turned",
        CORE + "models/layers.py",
        "key = rotary.turn(self._heads(key, context.step, self.key_norm))",
        "key = self._heads(key, context.step, self.key_norm)",
        MODEL,
    ),
    Fault(
        "the norm of the query is that of the key",
        CORE + "models/layers.py",
        "self._heads(query, context.step, self.query_norm)",
        "self._heads(query, context.step, self.key_norm)",
        MODEL,
    ),
    Fault(
        "a norm of every step reads the first step's weight",
        CORE + "models/layers.py",
        "weight = self.weights[step] if is_int else",
        "weight = self.weights[0] if is_int else",
        MODEL + " test_reference.py",
    ),
    Fault(
        "the block reads the weight of a norm that it only looks at",
        CORE + "models/layers.py",
        "[own for _, own in self.weights.named_parameters(remove_duplicate=False)]",
        "list(self.weights)",
        "mor_layers/models/test_uses_of_weights.py",
    ),
    Fault(
        "positions are those among the selected",
        CORE + "models/rotary.py",
        "angles = positions[..., None].float() * frequencies",
        "angles = torch.arange(len(positions))[:, None].expand_as(positions)[..., None].float()"
        " * frequencies",
        MODEL,
    ),
    Fault(
        "YaRN's ramp is over frequencies of twice the original length",
        CORE + "models/rope_scaling.py",
        "turned = self.original_max_position_embeddings / (turns * 2 * math.pi)",
        "turned = self.original_max_position_embeddings / (turns * math.pi)",
        "mor_layers/models/test_rope_scaling.py",
    ),
    Fault(
        "latent attention leaves YaRN's growth of scores out",
        CORE + "models/rope_scaling.py",
        "return self._growth(self.mscale_all_dim or 0.0) ** 2",
        "return self._growth(0.0) ** 2",
        "mor_huggingface/test_deepseek.py",
    ),
    Fault(
        "a head is compared with the token before the one it predicts",
        CORE + "models/prediction_heads.py",
        "targets = _later(labels, distance, -1)",
        "targets = _later(labels, distance - 1, -1)",
        "mor_layers/models/test_prediction_heads.py",
    ),
]
