"""An HTTP server for MoRTransformers that speaks the OpenAI completions protocol."""
