"""MoR models under vLLM: the model class and the plugin."""
