"""However the rows are cut, ops on a linear head return what whole logits do: any sizes, masks and chunk sizes."""

import pytest
import torch
import torch.nn.functional as F
from compare import filled
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf import linear_cross_entropy, linear_dpo_loss, linear_ppo_loss, linear_token_logprobs

CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "lengths": st.lists(st.integers(0, 9), min_size=0, max_size=4).map(lambda x: x + x[::-1]),  # an even number
        "width": st.integers(1, 7),
        "size": st.integers(1, 20),
        "kept": st.sampled_from([0.0, 0.3, 1.0]),
        "chunk_size": st.integers(1, 40),
        "budget": st.integers(0, 2000),
    }
)


class Case:
    """Random float64 inputs of these sizes."""

    def __init__(self, *, seed, lengths, width, size, kept, chunk_size, budget):
        generator, num_rows = torch.Generator().manual_seed(seed), sum(lengths)
        draw = {"generator": generator, "dtype": torch.float64}
        self.hidden, self.weight = torch.randn(num_rows, width, **draw), torch.randn(size, width, **draw)
        self.targets = torch.randint(size, (num_rows,), generator=generator)
        self.old, self.advantages = -torch.rand(num_rows, **draw), torch.randn(num_rows, **draw)
        self.advantages *= (
            torch.rand(num_rows, **draw) < 0.6
        )  # the rest get no gradient where entropy counts for nothing
        self.entropy_coef = 0.1 * (seed % 2)
        self.mask = torch.rand(num_rows, **draw) < kept
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        self.lengths, self.chunk_size, self.budget = lengths, chunk_size, budget

    def log_probs(self, hidden, weight):
        """(those of all tokens, those of the targets), from whole logits."""
        table = F.linear(hidden, weight).log_softmax(-1)
        return table, table.gather(1, self.targets[:, None])[:, 0]

    def mean(self, x):
        return torch.where(self.mask, x, 0).sum() / max(1, int(self.mask.sum()))


def logprobs(case, hidden, weight):
    options = {"chunk_size": case.chunk_size, "memory_budget": case.budget}
    outputs = linear_token_logprobs(hidden, weight, case.targets, return_entropy=True, **options)
    return case.mean(outputs[0] * case.advantages) + case.mean(outputs[1])


def logprobs_whole(case, hidden, weight):
    table, chosen = case.log_probs(hidden, weight)
    return case.mean(chosen * case.advantages) - case.mean((table.exp() * table).sum(1))


def cross_entropy(case, hidden, weight):
    return linear_cross_entropy(hidden, weight, case.targets, mask=case.mask, chunk_size=case.chunk_size)


def cross_entropy_whole(case, hidden, weight):
    return -case.mean(case.log_probs(hidden, weight)[1])


def ppo(case, hidden, weight):
    options = {"mask": case.mask, "entropy_coef": case.entropy_coef, "chunk_size": case.chunk_size}
    return linear_ppo_loss(hidden, weight, case.targets, case.old, case.advantages, **options)[0]


def ppo_whole(case, hidden, weight):
    table, chosen = case.log_probs(hidden, weight)
    ratio = (chosen - case.old).exp()
    surrogate = torch.minimum(ratio * case.advantages, ratio.clip(0.8, 1.2) * case.advantages)
    return -case.mean(surrogate) + case.entropy_coef * case.mean((table.exp() * table).sum(1))


def dpo(case, hidden, weight):
    options = {"mask": case.mask, "chunk_size": case.chunk_size}
    return linear_dpo_loss(hidden, weight, case.targets, case.cu_seqlens, case.old, **options)[0]


def dpo_whole(case, hidden, weight):
    log_ratios = torch.where(case.mask, case.log_probs(hidden, weight)[1] - case.old, 0)
    sums = [0.1 * part.sum() for part in log_ratios.split(case.lengths)] if case.lengths else []
    losses = [-F.logsigmoid(a - b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return sum(losses, 0 * hidden.sum() + 0 * weight.sum()) / max(1, len(losses))


OPS = [(logprobs, logprobs_whole), (cross_entropy, cross_entropy_whole), (ppo, ppo_whole), (dpo, dpo_whole)]


@pytest.mark.parametrize(("ours", "whole"), OPS, ids=lambda f: f.__name__)
@given(sizes=CASES)
@settings(max_examples=100, deadline=None)
def test_any_cut_gives_the_loss_and_gradients_of_whole_logits(ours, whole, sizes):
    case, results = Case(**sizes), []
    for function in (ours, whole):
        leaves = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        loss = function(case, *leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for actual, expected in filled(zip(*results, strict=True)):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
