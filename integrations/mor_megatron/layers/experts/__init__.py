"""Mixtures of experts that know the recursion step they run."""
