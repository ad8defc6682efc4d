"""Sublayers that differ from step to step, and what is added to those that the steps share."""
