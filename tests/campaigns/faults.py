"""Small semantic faults, as somebody might make them: what `planted_faults.py` plants.

Each names text that stands exactly once in its file, what takes its place, and the tests that should
notice. `test_planted_faults.py` keeps the list fitting the code.
"""

from dataclasses import dataclass

CORE, MEGATRON, TOOLS = "mor_layers/", "integrations/mor_megatron/", "integrations/mor_tools/"


@dataclass(frozen=True)
class Fault:
    """One change of the code."""

    what: str
    """What is wrong then."""
    file: str
    old: str
    new: str
    tests: str
    """Files or folders under `tests`, separated by spaces, that should notice."""


SELECTION = "mor_layers/selection mor_layers/recursion/test_block.py"
ROUTERS = "mor_layers/routers mor_layers/recursion/test_block.py"
POLICIES = "mor_layers/recursion"
MOE = "mor_layers/layers/test_moe.py"
MODEL = "mor_layers/models/test_transformer.py"
CACHE = "mor_layers/generation/test_kv_cache.py mor_layers/generation/test_incremental.py"
ENGINE = f"{CACHE} mor_layers/generation/test_engine.py"
SCHEDULER = "mor_layers/generation/test_scheduling.py"
SAMPLING = "mor_layers/generation/test_sampling.py"
RELAXATION = "mor_layers/layers/test_relaxation.py"
TEACHING = "mor_layers/training"
DEPTH = "mor_layers/generation/test_calibration.py mor_layers/routers"
LAYERS = "distributed/layers"
MEGATRON_TRAINING = "distributed/training distributed/layers/test_recursion_layer.py"
PRETRAINING = "mor_tools/pretraining"

FAULTS = [
    # Selection.
    Fault(
        "a capacity rounds up",
        CORE + "selection/capacity.py",
        "max(1, math.floor(share * length))",
        "max(1, math.ceil(share * length))",
        SELECTION,
    ),
    Fault(
        "a capacity of documents rounds to nearest",
        CORE + "selection/capacity.py",
        "(lengths.double() * share).floor()",
        "(lengths.double() * share).round()",
        SELECTION,
    ),
    Fault(
        "a capacity is counted in candidates, not in the sequence",
        CORE + "selection/decision.py",
        "capacity(share, self.tokens.sequence_length, multiple)",
        "capacity(share, weights.shape[0], multiple)",
        SELECTION,
    ),
    Fault(
        "selected tokens stand in the order of their weights",
        CORE + "selection/decision.py",
        "topk(kept, dim=0, sorted=False).indices.sort(dim=0).values",
        "topk(kept, dim=0).indices",
        SELECTION,
    ),
    Fault(
        "padding may be selected",
        CORE + "selection/decision.py",
        "is_selected = is_selected & ~self.tokens.is_padding\n        if len(is_selected) == 1",
        "is_selected = is_selected\n        if len(is_selected) == 1",
        SELECTION,
    ),
    Fault(
        "padding competes for a document's capacity",
        CORE + "selection/decision.py",
        "weights = weights.masked_fill(tokens.is_padding, -torch.inf)",
        "weights = weights.masked_fill(tokens.is_padding, 0)",
        SELECTION,
    ),
    Fault(
        "documents compete with one another",
        CORE + "selection/decision.py",
        "begin[1:] = torch.where(begins, row[1:], 0)",
        "begin[1:] = torch.where(begins, 0, 0)",
        SELECTION,
    ),
    Fault(
        "a document's length counts its padding",
        CORE + "selection/tokens.py",
        "torch.ones_like(positions) if is_padding is None else (~is_padding).long()",
        "torch.ones_like(positions)",
        SELECTION,
    ),
    Fault(
        "documents of one number that stand apart are one",
        CORE + "selection/tokens.py",
        "documents = begins.cumsum(dim=0)",
        "documents = documents - documents[:1]",
        SELECTION,
    ),
    Fault(
        "a selection forgets its documents",
        CORE + "selection/tokens.py",
        "documents=None if self.documents is None else self.documents.gather(0, rows),",
        "documents=None,",
        SELECTION,
    ),
    Fault(
        "tokens with the smallest weights are selected",
        CORE + "selection/decision.py",
        "        weights = weights.detach()\n        if self.tokens.is_plain:",
        "        weights = -weights.detach()\n        if self.tokens.is_plain:",
        SELECTION,
    ),
    # Routers.
    Fault(
        "the predictor's loss teaches the block",
        CORE + "routers/expert_choice.py",
        "self.predictors[step](hidden.detach())",
        "self.predictors[step](hidden)",
        ROUTERS + " test_reference.py",
    ),
    Fault(
        "warm-up is linear instead of a cosine",
        CORE + "routers/expert_choice.py",
        "0.5 * (1.0 + math.cos(math.pi * progress))",
        "(1.0 - progress)",
        ROUTERS,
    ),
    Fault(
        "warm-up ends a step late",
        CORE + "routers/expert_choice.py",
        "progress = min(1.0, training_step / self.warmup_steps)",
        "progress = min(1.0, max(0, training_step - 1) / self.warmup_steps)",
        ROUTERS,
    ),
    Fault(
        "the host keeps an old count of training steps after loading",
        CORE + "routers/expert_choice.py",
        "self._training_steps = self._bars = None\n",
        "self._bars = None\n",
        ROUTERS,
    ),
    Fault(
        "a threshold is compared with the probability",
        CORE + "routers/expert_choice.py",
        "return math.log(self.config.threshold / (1.0 - self.config.threshold))",
        "return self.config.threshold",
        ROUTERS,
    ),
    Fault(
        "gates lack alpha",
        CORE + "routers/expert_choice.py",
        "weights = self.config.alpha * self._activate(logits[..., 0])",
        "weights = self._activate(logits[..., 0])",
        ROUTERS + " test_reference.py",
    ),
    Fault(
        "causal routing follows the scorer where there is a predictor",
        CORE + "routers/expert_choice.py",
        "previous.keep_where(self._handicapped(logits[..., -1], previous) > bar)",
        "previous.keep_where(self._handicapped(logits[..., 0], previous) > bar)",
        ROUTERS,
    ),
    Fault(
        "the predictor's target is everyone",
        CORE + "routers/expert_choice.py",
        "sampling = losses.sampling_loss(predicting, is_selected, counted)",
        "sampling = losses.sampling_loss(predicting, is_selected | True, counted)",
        ROUTERS + " test_reference.py",
    ),
    Fault(
        "padding counts in the predictor's loss",
        CORE + "routers/expert_choice.py",
        "sampling = losses.sampling_loss(predicting, is_selected, counted)",
        "sampling = losses.sampling_loss(predicting, is_selected, None)",
        ROUTERS,
    ),
    Fault(
        "the bias over depth is part of the gate",
        CORE + "routers/token_choice.py",
        "gate = probabilities.gather(-1, depth[..., None])[..., 0]",
        "gate = (probabilities + self.depth_bias).gather(-1, depth[..., None])[..., 0]",
        ROUTERS,
    ),
    Fault(
        "a token runs one step less than it chose",
        CORE + "routers/token_choice.py",
        "previous.keep_where(previous.plan[..., 0] >= step)",
        "previous.keep_where(previous.plan[..., 0] > step)",
        ROUTERS + " test_reference.py",
    ),
    Fault(
        "the exit state starts from the state before the last step",
        CORE + "routers/token_choice.py",
        "exit_state = origin + (output",
        "exit_state = selected + (output",
        ROUTERS + " test_reference.py",
    ),
    Fault(
        "loss-free balancing pushes the wrong way",
        CORE + "routers/token_choice.py",
        "(counts.sum() - self.num_recursions * counts).sign()",
        "(self.num_recursions * counts - counts.sum()).sign()",
        ROUTERS,
    ),
    Fault(
        "loss-free balancing counts who ran, not who ended",
        CORE + "routers/token_choice.py",
        "counts = counts - F.pad(counts[1:], (0, 1))",
        "counts = counts - 0 * F.pad(counts[1:], (0, 1))",
        ROUTERS,
    ),
    Fault(
        "the balancing loss lacks the number of depths",
        CORE + "routers/losses.py",
        "* share * num_depths",
        "* share",
        ROUTERS + " test_reference.py",
    ),
    Fault(
        "the z-loss is not squared",
        CORE + "routers/losses.py",
        "torch.logsumexp(logits, dim=-1).square()",
        "torch.logsumexp(logits, dim=-1)",
        ROUTERS + " test_reference.py",
    ),
    Fault(
        "a masked mean divides by all rows",
        CORE + "routers/losses.py",
        "kept.sum() / weights.sum().clamp(min=1.0)",
        "kept.sum() / weights.numel()",
        ROUTERS,
    ),
    Fault(
        "a later step of depth-and-width ignores that an earlier one was refused",
        CORE + "routers/depth_and_width.py",
        "(logits.detach() > thresholds).cumprod(dim=-1)",
        "(logits.detach() > thresholds).long()",
        ROUTERS,
    ),
    Fault(
        "the gate of depth-and-width scales the forward pass",
        CORE + "routers/depth_and_width.py",
        "(1 + gate - gate.detach())",
        "(1 + gate)",
        ROUTERS,
    ),
    Fault(
        "a threshold follows the wrong side of the quantile",
        CORE + "routers/thresholds.py",
        "wanted = total * (1 - shares.to(total))[:, None]",
        "wanted = total * shares.to(total)[:, None]",
        ROUTERS,
    ),
    Fault(
        "the dial turns training too",
        CORE + "routers/thresholds.py",
        "return self.values if self.training else self.values + self.shift",
        "return self.values + self.shift",
        DEPTH,
    ),
    Fault(
        "the last of the calibrated shares is rounded away",
        CORE + "routers/scorer.py",
        "kept = min(len(values), max(0, round(count)))",
        "kept = min(len(values), max(0, round(count) - 1))",
        DEPTH,
    ),
    Fault(
        "scores are computed in the precision of the states",
        CORE + "routers/scorer.py",
        "values = hidden.float() if temperature == 1.0",
        "values = hidden.bfloat16().float() if temperature == 1.0",
        ROUTERS,
    ),
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
        CORE + "layers/moe.py",
        "gates = taken / taken.sum(dim=-1, keepdim=True).clamp(min=1e-20)",
        "gates = taken",
        MOE,
    ),
    Fault(
        "padding goes to experts",
        CORE + "layers/moe.py",
        "is_wanted &= ~is_padding[:, None]",
        "is_wanted &= ~is_padding[:, None] | True",
        MOE,
    ),
    Fault(
        "experts' capacity rounds down",
        CORE + "layers/moe.py",
        "num_experts * factor).ceil()",
        "num_experts * factor).floor()",
        MOE,
    ),
    Fault(
        "a token without probability keeps its place",
        CORE + "layers/moe.py",
        "order = chosen.detach().flatten().sort(descending=True, stable=True).indices",
        "order = chosen.detach().flatten().sort(descending=False, stable=True).indices",
        MOE,
    ),
    Fault(
        "the bias over experts enters the gates",
        CORE + "layers/moe.py",
        "chosen = probabilities.gather(-1, experts)",
        "chosen = ranking.gather(-1, experts)",
        MOE,
    ),
    Fault(
        "experts' losses are not shared out over steps",
        CORE + "layers/moe.py",
        "weights[n] / self.num_steps * loss",
        "weights[n] * loss",
        MOE,
    ),
    Fault(
        "gate and up of an expert are swapped",
        CORE + "layers/moe.py",
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
        "positions are those among the selected",
        CORE + "models/rotary.py",
        "angles = positions[..., None].float() * frequencies",
        "angles = torch.arange(len(positions))[:, None].expand_as(positions)[..., None].float()"
        " * frequencies",
        MODEL,
    ),
    # Generation.
    Fault(
        "a token does not see itself",
        CORE + "generation/cache/policies.py",
        "return Entered(rows, places, Visible(self.pages.row_of, lists, places + 1))",
        "return Entered(rows, places, Visible(self.pages.row_of, lists, places.clamp(min=1)))",
        ENGINE,
    ),
    Fault(
        "an exited token's row is shown from the step after",
        CORE + "generation/cache/policies.py",
        "shown = torch.where(self._step >= steps[:, None], rows[:, None], shown)",
        "shown = torch.where(self._step > steps[:, None], rows[:, None], shown)",
        ENGINE,
    ),
    Fault(
        "sharing counts tokens of every step",
        CORE + "generation/cache/policies.py",
        "return int((self.steps == 0).sum())",
        "return int((self.steps <= 1).sum())",
        ENGINE,
    ),
    Fault(
        "released pages are lost",
        CORE + "generation/cache/memory.py",
        "self._put_back([page for page in pages if page not in self.kept])",
        "self._put_back([page for page in pages[1:] if page not in self.kept])",
        CACHE + " mor_layers/generation/test_soak.py",
    ),
    Fault(
        "a page too few is asked for",
        CORE + "generation/cache/memory.py",
        "return (counts + self.page_size - 1) // self.page_size",
        "return counts // self.page_size",
        ENGINE,
    ),
    Fault(
        "8-bit keys lose their scale",
        CORE + "generation/cache/memory.py",
        ".amax(dim=-1).clamp(min=1e-30) / 127.0",
        ".amax(dim=-1).clamp(min=1e-30) / 128.0",
        ENGINE,
    ),
    Fault(
        "keys and values are swapped in place",
        CORE + "generation/cache/attention.py",
        "self.values = self.keys + (per_row - num_kv_heads)",
        "self.values = self.keys",
        ENGINE,
    ),
    Fault(
        "heads read one another's keys",
        CORE + "generation/cache/attention.py",
        "[:, None] // (num_heads // num_kv_heads)",
        "[:, None] % num_kv_heads",
        ENGINE,
    ),
    Fault(
        "prompts go before tokens",
        CORE + "generation/scheduling.py",
        "idle.sort(key=lambda p: (p.num_left > 1, p.number))",
        "idle.sort(key=lambda p: (p.num_left <= 1, p.number))",
        SCHEDULER,
    ),
    Fault(
        "the oldest gives way",
        CORE + "generation/scheduling.py",
        "return max(self.running.values(), key=lambda p: (running[p.request.client], p.number))",
        "return min(self.running.values(), key=lambda p: (running[p.request.client], p.number))",
        SCHEDULER,
    ),
    Fault(
        "pages that were promised stay promised",
        CORE + "generation/scheduling.py",
        "self._promised = [total + new - old for total, new, old in change]",
        "self._promised = [total + new for total, new, old in change]",
        SCHEDULER,
    ),
    Fault(
        "a request may take one token too many",
        CORE + "generation/scheduling.py",
        "return len(self.ids) + self.max_new_tokens - 1",
        "return len(self.ids) + self.max_new_tokens",
        SCHEDULER + " mor_layers/generation/test_engine.py",
    ),
    Fault(
        "a seed draws the same number for every token",
        CORE + "generation/sampling/draws.py",
        "(number + 1) * 0x9E3779B97F4A7C15",
        "0x9E3779B97F4A7C15",
        SAMPLING,
    ),
    Fault(
        "top-p leaves the likeliest token out",
        CORE + "generation/sampling/draws.py",
        "(before < top_p[:, None])",
        "(before + kept < top_p[:, None])",
        SAMPLING,
    ),
    Fault(
        "temperature multiplies",
        CORE + "generation/sampling/draws.py",
        ".div_(temperature[:, None])",
        ".mul_(temperature[:, None])",
        SAMPLING,
    ),
    # Weights and teaching.
    Fault(
        "a teacher's temperature is not squared",
        CORE + "training/distillation.py",
        "return temperature**2 * F.kl_div(",
        "return temperature * F.kl_div(",
        TEACHING,
    ),
    Fault(
        "student and teacher are swapped",
        CORE + "training/distillation.py",
        "F.kl_div(log_q, log_p, reduction",
        "F.kl_div(log_p, log_q, reduction",
        TEACHING,
    ),
    Fault(
        "an average is a sum",
        CORE + "weights/uptraining.py",
        "return (total / len(parts)).to(parts[0].dtype)",
        "return total.to(parts[0].dtype)",
        "mor_layers/weights",
    ),
    Fault(
        "the upper layers are the lower ones",
        CORE + "weights/uptraining.py",
        '"upper": num_shared - size + layer,',
        '"upper": layer,',
        "mor_layers/weights",
    ),
    Fault(
        "the last of the stepwise layers is left out",
        CORE + "weights/uptraining.py",
        "round(layer * (num_shared - 1) / max(size - 1, 1))",
        "round(layer * (num_shared - 1) / size)",
        "mor_layers/weights",
    ),
    # Megatron.
    Fault(
        "gradients of scores are summed over ranks",
        MEGATRON + "step/placement.py",
        "logits, tensor_parallel_output_grad=False, group=self.group",
        "logits, tensor_parallel_output_grad=True, group=self.group",
        LAYERS + "/test_recursion_layer.py",
    ),
    Fault(
        "gradients of rows that are put back are not summed",
        MEGATRON + "step/placement.py",
        "updated, tensor_parallel_output_grad=True, group=self.group",
        "updated, tensor_parallel_output_grad=False, group=self.group",
        LAYERS + "/test_recursion_layer.py",
    ),
    Fault(
        "ranks' filling takes part",
        MEGATRON + "step/placement.py",
        "return shard_of(is_padding, group, fill=True)",
        "return shard_of(is_padding, group, fill=False)",
        LAYERS,
    ),
    Fault(
        "the gradient of gates stays on its rank",
        MEGATRON + "step/placement.py",
        "return shard_of(copy_to_tensor_model_parallel_region(values, group=self.group), self.group)",
        "return shard_of(values, self.group)",
        LAYERS + "/test_recursion_layer.py",
    ),
    Fault(
        "routers' parameters are not marked for sequence parallelism",
        MEGATRON + "layers/recursion.py",
        'setattr(parameter, "sequence_parallel", config.sequence_parallel)',
        'setattr(parameter, "sequence_parallel", False)',
        MEGATRON_TRAINING,
    ),
    Fault(
        "statistics count a recomputed pass twice",
        MEGATRON + "layers/recursion.py",
        "        if is_counted:\n            self.statistics.record",
        "        if True:\n            self.statistics.record",
        MEGATRON_TRAINING,
    ),
    Fault(
        "counts stay on their data-parallel rank",
        MEGATRON + "layers/routing/updates.py",
        "torch.distributed.all_reduce(counts, group=data_group())\n    layer.recursion",
        "counts = counts.clone()\n    layer.recursion",
        MEGATRON_TRAINING,
    ),
    Fault(
        "observations stay on their data-parallel rank",
        MEGATRON + "layers/routing/updates.py",
        "        torch.distributed.all_reduce(value, group=data_group())\n    layer.rec",
        "        value.clone()\n    layer.rec",
        "distributed/layers/test_depth_by_expert.py distributed/training",
    ),
    Fault(
        "a router's loss ignores the loss scale",
        MEGATRON + "layers/routing/auxiliary_loss.py",
        "gradient = gradient * RouterLossScaler.scale.to(loss)",
        "gradient = gradient * 1.0",
        MEGATRON_TRAINING,
    ),
    Fault(
        "a function of the user's is not called any more",
        MEGATRON + "layers/routing/auxiliary_loss.py",
        "            self.earlier(scale)\n",
        "            pass\n",
        "distributed/training/test_updates_by_hand.py",
    ),
    Fault(
        "a document begins a token late",
        MEGATRON + "step/documents.py",
        "torch.cat([torch.zeros_like(begins[:, :1]), begins], dim=1).cumsum(dim=1)",
        "torch.cat([begins, torch.zeros_like(begins[:, :1])], dim=1).cumsum(dim=1)",
        LAYERS + "/test_documents.py",
    ),
    Fault(
        "context-parallel rows lie in zigzag order inside",
        MEGATRON + "step/context_parallel.py",
        "return torch.cat([chunks[0], chunks[1].flip(0)], dim=1)",
        "return torch.cat([chunks[0], chunks[1]], dim=1)",
        LAYERS + "/test_context_parallel.py",
    ),
    Fault(
        "the z-loss of experts is averaged over ranks' own means",
        MEGATRON + "layers/experts/padding.py",
        "torch.distributed.all_reduce(total, group=self.tp_cp_group)",
        "total = total * self.tp_cp_group.size()",
        LAYERS + "/test_depth_by_expert.py distributed/training",
    ),
    Fault(
        "experts of every step share a cell",
        MEGATRON + "layers/experts/router.py",
        "self.load[step] += taken.sum(dim=0)",
        "self.load[0] += taken.sum(dim=0)",
        LAYERS + "/test_depth_by_expert.py",
    ),
    Fault(
        "the teacher's divergence is one rank's",
        MEGATRON + "training/distillation.py",
        "        torch.distributed.all_reduce(divergence, group=group)\n",
        "",
        "distributed/training/test_distillation.py",
    ),
    Fault(
        "the teacher's gradient lacks its temperature",
        MEGATRON + "training/distillation.py",
        "gradient = ctx.temperature * gradients[0]",
        "gradient = gradients[0]",
        "distributed/training/test_distillation.py",
    ),
    # Pretraining.
    Fault(
        "a resumed run reads a batch twice",
        TOOLS + "pretraining/data/datasets.py",
        "first=first_step * settings.training.global_batch_size,",
        "first=max(0, first_step - 1) * settings.training.global_batch_size,",
        PRETRAINING + "/test_resume.py",
    ),
    Fault(
        "the learning rate is a step late",
        TOOLS + "pretraining/optimizer.py",
        "lr_warmup_steps=training.warmup_steps,",
        "lr_warmup_steps=training.warmup_steps + 1,",
        PRETRAINING,
    ),
    Fault(
        "the final learning rate is 0",
        TOOLS + "pretraining/optimizer.py",
        '"min_lr": training.final_learning_rate,',
        '"min_lr": 0.0,',
        PRETRAINING,
    ),
    Fault(
        "there is no weight decay",
        TOOLS + "pretraining/optimizer.py",
        "        start_wd=training.weight_decay,\n        end_wd=training.weight_decay,",
        "        start_wd=0.0,\n        end_wd=0.0,",
        PRETRAINING,
    ),
    Fault(
        "routers are not told of optimizer steps",
        TOOLS + "pretraining/training.py",
        "        update_routers(self.chunks)\n",
        "",
        PRETRAINING,
    ),
    Fault(
        "causal validation is not causal",
        TOOLS + "pretraining/training.py",
        "with causal_routing(self.chunks) if causal else nullcontext():",
        "with nullcontext():",
        PRETRAINING,
    ),
    Fault(
        "documents see one another in training",
        TOOLS + "pretraining/training.py",
        "return is_same.tril().logical_not()",
        "return torch.ones_like(is_same).tril().logical_not()",
        PRETRAINING,
    ),
    Fault(
        "the held-out split is at the beginning",
        TOOLS + "pretraining/data/text.py",
        "key=lambda d: _hash([d.name]))",
        "key=lambda d: d.name)",
        PRETRAINING + "/test_text.py",
    ),
    Fault(
        "documents have no end",
        TOOLS + "pretraining/data/text.py",
        "builder.add_document([*encoding.ids, tokenizer.eod], [len(encoding.ids) + 1])",
        "builder.add_document([*encoding.ids], [len(encoding.ids)])",
        PRETRAINING + "/test_text.py",
    ),
    # Scaled rotary embeddings, heads of multi-token prediction, DeepSeek's experts.
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
    Fault(
        "heads keep rows of rejected drafts",
        CORE + "generation/head_drafts.py",
        "self._first[texts] = (ends + 2 - len(self.heads)).clamp(min=0)",
        "self._first[texts] = (ends + 1).clamp(min=0)",
        "mor_layers/generation/test_speculation.py",
    ),
    Fault(
        "every step takes the expert bias of the first",
        MEGATRON + "checkpoints/weights.py",
        "return parts[0][_step_of(name)]",
        "return parts[0][0]",
        "distributed/checkpoints/test_weights.py",
    ),
    # Several recursions.
    Fault(
        "a metric keeps the number that its step has within the recursion",
        TOOLS + "reports/rows.py",
        'f"step_{int(found[1]) + earlier}/"',
        'f"step_{int(found[1])}/"',
        "mor_tools/pretraining/test_report.py",
    ),
    Fault(
        "scores of a later recursion are noted at the steps of the first",
        CORE + "inspection.py",
        "scores[first + score.step, positions]",
        "scores[score.step, positions]",
        "mor_layers/test_inspection.py",
    ),
    Fault(
        "every recursion is calibrated to the first one's shares",
        CORE + "generation/depth/calibration.py",
        "return [shares[end - count : end] for end, count",
        "return [shares[:count] for end, count",
        "mor_layers/generation/test_calibration.py",
    ),
    Fault(
        "a stage may begin between layers that balance depth",
        MEGATRON + "parallel/stages.py",
        "return recursion.anchor_every or num_blocks",
        "return 1",
        "mor_layers/models/test_mixture_of_depths.py",
    ),
]
