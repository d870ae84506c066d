"""A Hugging Face backbone with our attention, heads and adapters, read as policy, reward model or value model."""
