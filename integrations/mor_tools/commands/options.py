"""Options that several commands have."""

TRUST_REMOTE_CODE = (
    "let the model name a router of its own, whose module is imported and so runs; use it only "
    "for models whose origin you trust"
)
