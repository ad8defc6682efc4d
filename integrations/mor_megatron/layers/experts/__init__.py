"""Mixtures of experts that know which recursion step they run."""
