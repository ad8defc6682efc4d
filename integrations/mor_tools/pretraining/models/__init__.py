"""The models of a run: the one that is trained, its teacher, and its initial weights."""
