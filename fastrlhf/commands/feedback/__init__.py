"""A model in place of people: it labels pairs, and criticises and revises responses (docs/feedback.md)."""
