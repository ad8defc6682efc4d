from tests.distributed.pipeline.test_pipeline import *
from mor_layers.recursion import HyperConnections, HistoryInjection, LoopLoss
from mor_layers.routers import AdaptiveHalting
from tests.distributed.pipeline.pipeline_setup import *
NEW = {
 "exit expert": Case(recursion(3,"expert","exit_state")),
 "exit token recompute": Case(recursion(3,"token","exit_state"), config=FULL_RECOMPUTE),
 "exit docs": Case(RecursionConfig(3, router=ExpertChoice(capacity_factors=(0.9,0.58,0.3)), kv_policy="exit_state"), documents=True),
 "exit sp": Case(recursion(3,"token","exit_state"), tp=2, config=SP),
 "streams": Case(replace(recursion(3,"expert"), hyper_connections=HyperConnections(2), input_injection=True)),
 "static streams sp recompute": Case(replace(recursion(3,"token"), hyper_connections=HyperConnections(3,"static")), tp=2, config=SP|FULL_RECOMPUTE),
 "history": Case(replace(recursion(3,"expert","exit_state"), history=HistoryInjection(1))),
 "halting": Case(RecursionConfig(3, router=AdaptiveHalting())),
 "streams fixed": Case(RecursionConfig(3, hyper_connections=HyperConnections(2))),
}
@pytest.mark.parametrize("name", NEW)
def test_new(pool, on_one_rank, name): check(pool, on_one_rank, NEW[name])
