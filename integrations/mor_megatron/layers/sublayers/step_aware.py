"""How modules inside Megatron's layers learn which step of a recursion runs."""


class StepAware:
    """Mix-in for a module that needs the recursion step but is called by code that cannot pass it.

    Wherever a `StepContext` is available, `context.step` is the step. Megatron's layers pass the
    context to attention only (in the place of its mask); norms, linear layers and the MLP are
    called with arguments that Megatron has fixed. `StepStack` therefore calls `begin_step` on each
    of these modules before it runs their layer.

    These numbers are not state: they are set again before every forward pass. A module that
    recomputes itself in the backward pass must remember them, as `RecursiveMoELayer` does.
    """

    step: int = 0
    """0-based recursion step that is running."""
    unrolled_layer_number: int = 0
    """1-based number of the layer in the unrolled model, under which Megatron logs it."""

    def begin_step(self, step: int, layer_number: int) -> None:
        """Announce that the next forward pass is `step`, as unrolled layer `layer_number`
        (1-based).
        """
        self.step, self.unrolled_layer_number = step, layer_number
