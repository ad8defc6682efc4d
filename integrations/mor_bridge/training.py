"""What a training loop of Megatron-Bridge has to do for routers, as a callback."""

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core.utils import get_model_config

from mor_megatron import routing_reports, update_routers_automatically


class RouterUpdates(Callback):
    """Updates routers after each batch, and adds their figures to the log.

        pretrain(config, forward_step, callbacks=[RouterUpdates()])

    Capacity warm-up, loss-free biases and thresholds advance in the schedule, see
    `update_routers_automatically`. The log line, TensorBoard and W&B report, for each recursion and
    beside the loss, the share of tokens that ran a step, the share of positions without a token in the
    last step, and the router's metrics.
    """

    def on_train_start(self, context: CallbackContext) -> None:
        """Install the updates, after `setup` has set the function that they extend."""
        update_routers_automatically(get_model_config(context.model[0]))

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Add figures to the losses of the step, which are logged after this."""
        reports = routing_reports(context.model)  # on all ranks, because it reduces over them
        if not context.loss_dict:  # the last stage logs
            return
        device = next(iter(context.loss_dict.values())).device
        for number, report in enumerate(reports, start=1):
            place = "recursion" if len(reports) == 1 else f"recursion {number}"
            figures = {f"step {n} share": share for n, share in enumerate(report.shares, start=1)}
            figures["dead positions"] = report.dead_positions
            figures |= report.metrics
            for name, value in figures.items():
                context.loss_dict[f"{place} {name}"] = torch.tensor(value, device=device)
