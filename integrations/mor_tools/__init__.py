"""Tools for people around mor_layers: formats, planner, pretraining, reports, serving, commands."""
