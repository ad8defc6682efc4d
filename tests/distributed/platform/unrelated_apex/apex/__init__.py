"""A package that only shares NVIDIA's name, as the one that package indexes call `apex`."""
