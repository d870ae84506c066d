"""Studies with several responses to each prompt: the best of n, two rewards over weights, over-optimisation."""
