"""Faults of generation and of what looks inside a model."""

from tests.campaigns.planted_faults.fault import CORE, Fault

CACHE = "mor_layers/generation/test_kv_cache.py mor_layers/generation/test_incremental.py"
ENGINE = f"{CACHE} mor_layers/generation/test_engine.py"
SCHEDULER = "mor_layers/generation/test_scheduling.py"
SAMPLING = "mor_layers/generation/test_sampling.py"
GRAPH = "mor_layers/generation/test_static_tick.py"

GENERATION_FAULTS = [
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
        '{"int8": 127.0,',
        '{"int8": 128.0,',
        ENGINE,
    ),
    Fault(
        "8-bit floating point is read as integers",
        CORE + "generation/cache/memory.py",
        'if self.eight_bits == "int8":',
        "if self.eight_bits:",
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
        "a graph takes the pages of a tick from the wrong end",
        CORE + "generation/cache/memory.py",
        "pages = self._stack[(self._top - num_taken)",
        "pages = self._stack[(self._top - 1 - num_taken)",
        GRAPH,
    ),
    Fault(
        "in a graph, tokens of a list in one tick share a row",
        CORE + "generation/cache/memory.py",
        "places = self.counts[lists] + is_before.sum(dim=1)",
        "places = self.counts[lists]",
        GRAPH,
    ),
    Fault(
        "a graph routes all rows by the rule of the first step",
        CORE + "generation/tick/graph/tick.py",
        "is_own = rows.steps == step",
        "is_own = rows.steps >= 1",
        GRAPH,
    ),
    Fault(
        "who finds no room to leave a graph is forgotten",
        CORE + "generation/tick/graph/tick.py",
        "return states, is_through | (has_exit & (self.exits.left == 0))",
        "return states, has_exit & (self.exits.left == 0)",
        GRAPH,
    ),
    Fault(
        "a chunk leaves a graph as if it were one token",
        CORE + "generation/tick/link.py",
        "self._exits.left[span.slot] += 1",
        "self._exits.left[span.slot] += 0",
        GRAPH,
    ),
    Fault(
        "rows of a graph without a token write to the cache",
        CORE + "generation/tick/graph/attention.py",
        "source = torch.where(is_written, index, is_written.long().argmax())",
        "source = index",
        GRAPH,
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
    Fault(
        "heads keep rows of rejected drafts",
        CORE + "generation/drafts/head_drafts.py",
        "self._first[texts] = (ends + 2 - len(self.heads)).clamp(min=0)",
        "self._first[texts] = (ends + 1).clamp(min=0)",
        "mor_layers/generation/test_speculation.py",
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
]
