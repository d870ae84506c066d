"""Formulas with a paper, chosen by settings: scores to rewards to advantages, KL control, losses of preferences."""
