"""Text and the sequences of a run made from it."""
