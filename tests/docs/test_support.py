"""The page of what goes together says what the code says, and what it says works."""

from typing import get_args

import pytest
import torch

from mor_layers import DecoderConfig, MoRTransformer
from mor_layers.generation import CacheSettings, DepthBatchingEngine, Request
from mor_layers.recursion import KVPolicy, Sharing
from tests.docs import support_table

REWRITE = "write it anew: python -m tests.docs.support_table, with what `make test` has on its path"


def test_the_page_has_the_tables_of_the_code():
    page = support_table.PAGE.read_text("utf-8")
    assert page == support_table.written(page), REWRITE
    for table in support_table.TABLES.values():
        assert support_table.YES in table()
        assert support_table.NO in table()


@pytest.mark.parametrize("router", support_table.routers())
def test_what_the_page_says_goes_together_trains_and_generates(router):
    torch.manual_seed(0)
    for sharing in get_args(Sharing):
        for policy in get_args(KVPolicy):
            recursion = support_table.recursion(router, sharing, policy)
            if recursion is None:
                continue
            layers = 8 if sharing.startswith("middle") else 6
            model = MoRTransformer(DecoderConfig(31, 16, 24, layers, 2, recursion=recursion))
            ids = torch.randint(31, (2, 9))
            output = model(ids, labels=ids.roll(-1, dims=1))
            output.loss.backward()
            assert output.loss.isfinite()
            torch.optim.SGD(model.parameters(), lr=0.01).step()
            model.advance([output])
            model.eval()
            engine = DepthBatchingEngine(model, CacheSettings.for_all_steps(model, max_length=16))
            events = engine.stream(Request(tuple(ids[0].tolist()), max_new_tokens=4))
            expected = [int(token) for token in model.generate(ids[:1], 4)]
            assert [event.token for event in events if event.token is not None] == expected
