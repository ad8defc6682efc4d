"""A tick as one graph: exact, compiled once, and for whatever is in flight."""
