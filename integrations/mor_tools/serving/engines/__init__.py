"""The engines of a server: one in a thread, or replicas in processes of their own."""
