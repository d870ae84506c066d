"""A small policy whose head is fused stays together with one whose logits are made whole in float32.

The gradient is that of the expected reward, every token of every context weighted by its probability: with tokens drawn
instead, the first draw that rounding flips parts the runs, whichever head they have."""

import functools

import pytest
import torch

from fastrlhf import linear_ppo_loss, linear_token_logprobs

NUM_CONTEXTS, WIDTH, SIZE, NUM_STEPS = 8, 32, 128, 200
ENTROPY_COEF = 0.05
TOKENS = torch.arange(SIZE).repeat(NUM_CONTEXTS)
CONTEXTS = torch.arange(NUM_CONTEXTS).repeat_interleave(SIZE)


class Fused:
    """logprobs, and (loss, entropy), through the fused head."""

    @staticmethod
    def logprobs(hidden, weight):
        return linear_token_logprobs(hidden, weight, TOKENS, chunk_size=300)

    @staticmethod
    def loss(hidden, weight, old, advantages):
        options = {"entropy_coef": ENTROPY_COEF, "chunk_size": 300}
        loss, stats = linear_ppo_loss(hidden, weight, TOKENS, old, advantages, **options)
        return loss, stats["entropy"]


class Whole:
    """The same from whole logits, in `dtype`; what follows them is in float32 at least."""

    def __init__(self, dtype):
        self.dtype = dtype

    def both(self, hidden, weight):
        logits = hidden.to(self.dtype) @ weight.to(self.dtype).t()
        table = logits.to(torch.promote_types(self.dtype, torch.float32)).log_softmax(-1)
        return table.gather(1, TOKENS[:, None])[:, 0].float(), -(table.exp() * table).sum(-1).float()

    def logprobs(self, hidden, weight):
        return self.both(hidden, weight)[0]

    def loss(self, hidden, weight, old, advantages):
        logprobs, entropy = self.both(hidden, weight)
        return -((logprobs - old).exp() * advantages).mean() - ENTROPY_COEF * entropy.mean(), entropy.mean()


HEADS = {
    "fused": Fused(),
    "float32": Whole(torch.float32),
    "float64": Whole(torch.float64),
    "bf16": Whole(torch.bfloat16),
}


@functools.cache
def entropies(head, seed):
    """The entropy at each step of training with weights in bfloat16, rounded from float32 ones as autocast does it."""
    head, generator = HEADS[head], torch.Generator().manual_seed(seed)
    shapes = (NUM_CONTEXTS, WIDTH), (WIDTH, WIDTH), (SIZE, WIDTH)
    scales = 1, WIDTH**-0.5, WIDTH**-0.5
    parameters = [
        (scale * torch.randn(shape, generator=generator)).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    rewards, result = torch.randn(NUM_CONTEXTS * SIZE, generator=generator), []
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(NUM_STEPS):
        embedding, layer, weight = (p.bfloat16() for p in parameters)
        hidden = torch.tanh(embedding @ layer.t())[CONTEXTS]
        with torch.no_grad():
            old = head.logprobs(hidden, weight)
            values = (old.exp() * rewards).view(NUM_CONTEXTS, SIZE).sum(1)
            advantages = SIZE * old.exp() * (rewards - values[CONTEXTS])
        loss, entropy = head.loss(hidden, weight, old, advantages)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(entropy.item())
    return torch.tensor(result)


def drift(head, seed):
    """How far the entropy under this head comes from that under whole float32 logits, at most."""
    return (entropies(head, seed) - entropies("float32", seed)).abs().max().item()


@pytest.mark.parametrize("seed", range(2))
def test_entropy_stays_within_three_thousandths_of_that_of_full_float32_logits(seed):
    whole = entropies("float32", seed)
    assert whole[0] > 4.5 and whole[-1] < 0.5  # a policy that learns: of 128 tokens, few are left
    assert drift("fused", seed) < 0.003  # six seeds: at most 0.0008, and with bfloat16 logits 0.005 to 0.045


def test_the_drift_is_that_of_float64_logits_and_several_times_smaller_than_that_of_bfloat16_ones():
    """Gradients rounded to bfloat16 part any two heads; logits rounded to bfloat16 part them further."""
    fused, float64, bf16 = (sum(drift(head, seed) for seed in range(2)) for head in ("fused", "float64", "bf16"))
    assert fused < 3 * float64
    assert bf16 > 4 * fused
