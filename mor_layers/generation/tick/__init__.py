"""A tick: every token in flight runs the block once, operation by operation or as one graph."""
