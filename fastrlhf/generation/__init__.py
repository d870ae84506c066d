"""Prompts in, samples with their log-probabilities out: the engine, or a server."""
