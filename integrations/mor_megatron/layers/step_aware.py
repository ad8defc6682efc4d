"""How modules inside Megatron's layers learn which step of a recursion runs."""


class StepAware:
    """Mix-in for a module that must know the step, and is called by code that cannot say it.

    Wherever a `StepContext` arrives, `context.step` says which step runs. Megatron's layers hand a
    context to attention only, in the place of its mask: norms, linear layers and the MLP are called
    with arguments that Megatron has fixed. These modules are told beforehand, through this one
    other channel: `StepStack` calls `begin_step` on every one of a layer's before it runs the layer.

    The numbers are not state: they are set anew before each forward pass. A module that recomputes
    itself in the backward pass must take them along, see `RecursiveMoELayer`.
    """

    step: int = 0
    """0-based recursion step that runs."""
    unrolled_layer_number: int = 0
    """1-based number of the layer in the unrolled model, which Megatron's logs go by."""

    def begin_step(self, step: int, layer_number: int) -> None:
        """The next forward pass runs `step` as unrolled layer `layer_number` (1-based)."""
        self.step, self.unrolled_layer_number = step, layer_number
