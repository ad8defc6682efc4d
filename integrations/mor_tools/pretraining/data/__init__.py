"""The text of a run, and the training sequences made from it."""
