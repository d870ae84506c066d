"""What the demo run ships: a small model, questions and demonstrations."""
