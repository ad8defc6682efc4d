"""An HTTP server for MoRTransformers that implements the OpenAI completions protocol."""
