"""Routers by which a token stops once its own states say so."""
