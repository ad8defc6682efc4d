"""What routers learn from all ranks after a step, and what is reported of them, against numbers
worked out by hand for two ranks that saw different tokens."""

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from mor_layers import DepthAndWidth, FixedDepth, RecursionConfig, TokenChoice
from mor_megatron import recursion_layers, routing_reports, update_routers
from mor_megatron.layers.routing.auxiliary_loss import RouterLossScaler, listen_for_loss_scale
from tests.distributed import megatron_setup as setup
from tests.distributed.pool import WorkerPool
from tests.distributed.training.test_recursion_training import (
    MOE,
    RECOMPUTE,
    SEQUENCE_LENGTH,
    build,
)


def bias_after_an_update() -> list[float]:
    setup.initialize()
    router = TokenChoice(balancing="loss_free", balancing_coefficient=0.25)
    chunks = build(RecursionConfig(3, router=router), {})
    (layer,) = recursion_layers(chunks)
    own = [[10.0, 10, 2, 1], [10.0, 10, 9, 8]][torch.distributed.get_rank()]
    layer.statistics.tokens_per_step = torch.tensor(own)
    update_routers(chunks)
    return layer.recursion.router.depth_bias.tolist()


def test_a_loss_free_bias_follows_the_counts_of_all_copies(pool: WorkerPool) -> None:
    # Of 20 tokens 9 took one step, 2 took two and 9 took three, where 6.7 each would be even. The
    # first rank alone would say 8, 1, 1, the second 1, 1, 8.
    for bias in pool.run(bias_after_an_update, 2):
        assert bias == [-0.25, 0.25, -0.25]


def threshold_after_an_update() -> float:
    setup.initialize()
    chunks = build(
        RecursionConfig(2, router=DepthAndWidth(continue_shares=(0.5,))), {"num_layers": 6}
    )
    (layer,) = recursion_layers(chunks)
    router = layer.recursion.router
    own = torch.tensor([[1.0, 2, 3], [4, 5, 6]][torch.distributed.get_rank()])
    histogram = router.depths.histogram(0, own, None)
    layer.statistics.observations["depth_histograms"] = histogram[None]
    update_routers(chunks)
    assert not layer.statistics.observations
    return router.depths.values.item()


def test_thresholds_follow_the_quantile_over_all_copies(pool: WorkerPool) -> None:
    # From 0, 0.3 of the way to the median of 1 to 6, which lies between 3 and 4. The first rank's
    # own median is 2, the second's 5.
    first, second = pool.run(threshold_after_an_update, 2)
    assert first == second
    assert 0.3 * 2.95 < first < 0.3 * 4.05


def reports_of_two_ranks() -> list[object]:
    setup.initialize()
    rank = torch.distributed.get_rank()
    chunks = build(RecursionConfig(2, router=FixedDepth()), MOE | {"num_layers": 6})
    (layer,) = recursion_layers(chunks)
    statistics = layer.statistics
    statistics.tokens_per_step = torch.tensor([[8.0, 8, 2], [8.0, 6, 5]][rank])
    statistics.last_step_positions = torch.tensor([[1, 0, 0, 1], [2, 0, 0, 3]][rank])
    statistics.metrics["step_1/router_z_loss"] = torch.tensor([6.0, 10.0][rank])
    statistics.metric_counts["step_1/router_z_loss"] = [2, 1][rank]
    cells = layer.expert_routers[0].cells
    cells.load[1] = torch.tensor([[3.0, 1, 0, 0], [0, 0, 1, 0]][rank])
    cells.drops[1] = torch.tensor([[0.0, 0, 2, 0], [0, 1, 0, 0]][rank])
    cells.squares[1] = [8.0, 1.0][rank]
    cells.tokens[1] = [4.0, 1.0][rank]
    cells.scores[1] = torch.tensor([[2.0, 1, 1, 0], [0, 0, 0.5, 0.5]][rank])
    (report,) = routing_reports(chunks)
    (again,) = routing_reports(chunks)
    return [report, again]


def test_a_report_is_of_the_global_batch(pool: WorkerPool) -> None:
    for report, again in pool.run(reports_of_two_ranks, 2):
        assert report.shares == pytest.approx((14 / 16, 7 / 16))
        assert report.dead_positions == 0.5
        # The z-loss of the router over depth: the mean of 6 / 2 and 10 / 1.
        assert report.metrics == {"step_1/router_z_loss": pytest.approx(6.5)}
        # Of the router over experts: over five tokens, however they are spread.
        assert report.expert_z_loss[1, 0].item() == pytest.approx(9 / 5)
        assert report.expert_load[1, 0].tolist() == [3, 1, 1, 0]
        assert report.expert_drops[1, 0].tolist() == [0, 1, 2, 0]
        wanted, mean = [3 / 8, 2 / 8, 3 / 8, 0], [2 / 5, 1 / 5, 1.5 / 5, 0.5 / 5]
        balance = [4 * share * score for share, score in zip(wanted, mean, strict=True)]
        assert report.expert_balance[1, 0].tolist() == pytest.approx(balance)
        assert again.shares == (0.0, 0.0)
        assert not again.expert_load.any()
        assert not again.expert_z_loss.any()


LOGITS = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [9, 9, 9, 9], [2, 0, 1, 0]])
IS_PADDING = torch.tensor([False, False, True, False])


def z_loss_of_tensor_parallel_ranks() -> tuple[float, torch.Tensor]:
    """Three tokens and one of padding, two rows a rank."""
    setup.initialize(tp=2)
    chunks = build(
        RecursionConfig(2, router=FixedDepth()), MOE | {"num_layers": 6, "sequence_parallel": True}
    )
    (layer,) = recursion_layers(chunks)
    (router, *_) = layer.expert_routers
    router.set_layer_number(2)
    rank = torch.distributed.get_rank()
    rows = slice(2 * rank, 2 * rank + 2)
    logits = LOGITS[rows].clone().requires_grad_()
    router.apply_z_loss(logits, IS_PADDING[rows]).sum().backward()
    tracker = get_moe_metrics_tracker()
    logged = []
    sync = tracker._aggregate

    def noted(*arguments, **options):
        logged.append(tracker.metrics["z_loss"].values[1].item())
        return sync(*arguments, **options)

    tracker._aggregate = noted
    tracker.report(1.0, 0, num_layers=6)
    return logged[0], logits.grad - 1


def test_the_z_loss_is_the_mean_over_the_tokens_of_all_ranks(pool: WorkerPool) -> None:
    valid = LOGITS[~IS_PADDING].clone().requires_grad_()
    expected = valid.logsumexp(dim=-1).square().sum() / 3
    (0.001 / 2 * expected).backward()  # each of the two steps has its part of the coefficient
    results = pool.run(z_loss_of_tensor_parallel_ranks, 2)
    assert [logged for logged, _ in results] == pytest.approx([expected.item()] * 2, rel=1e-6)
    gradient = torch.cat([gradient for _, gradient in results])
    torch.testing.assert_close(gradient[~IS_PADDING], valid.grad, rtol=1e-3, atol=1e-6)
    assert not gradient[IS_PADDING].any()


def scales_heard() -> tuple[list[float], float]:
    setup.initialize()
    heard: list[torch.Tensor] = []
    config = setup.tiny_config(num_layers=6)
    config.experimental_attention_variant_loss_scale_func = heard.append
    for _ in range(2):  # a second recursion must not put itself in front once more
        listen_for_loss_scale(config)
    config.experimental_attention_variant_loss_scale_func(torch.tensor([0.25]))
    assert RouterLossScaler.scale is not None
    return [scale.item() for scale in heard], RouterLossScaler.scale.item()


def test_a_loss_scale_function_of_the_users_own_is_still_called(pool: WorkerPool) -> None:
    ((heard, ours),) = pool.run(scales_heard)
    assert heard == [0.25]
    assert ours == 0.25


def counts_of_a_recomputed_step() -> list[float]:
    setup.initialize()
    chunks = build(RecursionConfig(2, router=FixedDepth()), RECOMPUTE["full"] | {"num_layers": 6})
    setup.forward_backward(chunks, setup.random_tokens(4, SEQUENCE_LENGTH), 2)
    (layer,) = recursion_layers(chunks)
    return layer.statistics.tokens_per_step.tolist()


def test_a_recomputed_pass_counts_once(pool: WorkerPool) -> None:
    # Recomputation runs each forward pass twice: entered, then ran step 1 and step 2.
    (counts,) = pool.run(counts_of_a_recomputed_step)
    assert counts == [4 * SEQUENCE_LENGTH] * 3
