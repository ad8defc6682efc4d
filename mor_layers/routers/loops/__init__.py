"""Routers that do not look at the tokens: the depth is fixed, or drawn at random."""
