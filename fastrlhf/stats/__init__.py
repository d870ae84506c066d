"""Statistics that say how far a reward model can be trusted: pure functions of scores, labels and token ids.

A pair has a margin d = score(chosen) - score(rejected), and a label y, the probability that its chosen response is the
better one: 1, unless the data says otherwise (`preference`). All arithmetic is in float64. A cluster is a prompt: pairs
on the same prompt are not independent, and intervals take account of that.
"""
