"""Formulas of papers, on tensors and numbers: advantages, control of the KL, losses of preferences."""
