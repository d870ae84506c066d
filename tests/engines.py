"""Tiny models that generate, and what transformers says of their samples."""

import torch
from tiny import tiny_model

from fastrlhf.generation.engine import Engine, Sampling
from fastrlhf.models.attention import ATTENTION

EOS = 1
LENGTHS = (5, 1, 23, 2, 12, 40, 9, 9, 17)  # of the prompts: more than one window, fewer and more than one slot's worth


def model_of(arch="llama", **changes):
    """A tiny model with sharper logits than random weights give, so that prompts matter."""
    torch.manual_seed(3)
    model = tiny_model(arch, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model


def prompts_of(lengths=LENGTHS, vocab=300):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in lengths]


def engine_of(model, *, eos=(EOS,), **options):
    model.set_attn_implementation(ATTENTION)
    return Engine(model, eos_token_ids=eos, **options)


def teacher_forced(model, sample, temperature=1.0):
    """Log-probabilities of the response by one pass of plain transformers over the whole text."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        tokens = torch.tensor([sample.prompt + sample.response], device=model.device)
        logits = model(tokens, use_cache=False).logits[0].cpu()
    model.set_attn_implementation(ATTENTION)
    rows = logits[len(sample.prompt) - 1 : -1].double() / temperature
    return rows.log_softmax(-1).gather(1, torch.tensor(sample.response)[:, None])[:, 0]


def assert_teacher_forced(model, sample, temperature=1.0):
    expected = teacher_forced(model, sample, temperature)
    # logits to 1e-5, which the temperature scales, and the rounding of a log-probability itself
    torch.testing.assert_close(torch.tensor(sample.logprobs).double(), expected, rtol=2e-6, atol=1e-5 / temperature)


LIMITS = [3, 1, 14, 20, 2, 9, 1, 6, 20]


def generate(engine, num_samples=1, **options):
    prompts = [prompt for prompt in prompts_of() for _ in range(num_samples)]
    limits = [limit for limit in LIMITS for _ in range(num_samples)]
    return engine.generate(prompts, Sampling(20, **options), seeds=range(len(prompts)), limits=limits)


def assert_same_samples(samples, expected):
    assert [(s.response, s.finished) for s in samples] == [(e.response, e.finished) for e in expected]
    for sample, other in zip(samples, expected, strict=True):
        torch.testing.assert_close(torch.tensor(sample.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-5)
