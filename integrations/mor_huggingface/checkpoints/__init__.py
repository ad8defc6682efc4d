"""Checkpoints of published models as transformers writes them: read, and written."""
