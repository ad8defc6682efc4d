"""Routers whose scorers choose: the best tokens of each step, or how deep each token goes."""
