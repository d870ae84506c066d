"""What the demo run needs and ships: a small model, questions, demonstrations, and a gold reward."""
