"""Generation over tensor-parallel ranks."""
