"""Every public op, with each of its options, is one graph for torch.compile, backward included, and gives what it gives
without."""

import inspect

import pytest
import torch
import torch.distributed as dist
from op_matrix import INTERNAL, MATRIX
from torch import Tensor

import fastrlhf

NOT_COMPILED = {"token_logprobs": {"inplace_backward"}}  # writes over its input; refused by name
IN_A_GROUP = {"masked_whiten": {"group"}, "ppo_advantages": {"group"}}  # tested below


def rows(*shape, grad=False, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def leaf(*shape):
    return rows(*shape, grad=True)


def bounds(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def mask(num):
    return torch.arange(num) % 3 != 1


def head_options(width=6, vocab=11):
    return [
        {},
        {"bias": leaf(vocab)},
        {"lora": (leaf(2, width), leaf(vocab, 2), 0.5)},
        {"logit_scale": 0.5, "logit_softcap": 3.0},
        {"chunk_size": 3},
        {"chunk_size": 64, "batch_invariant": True},
    ]


def head(num=8, width=6, vocab=11):
    return leaf(num, width), leaf(vocab, width), torch.randint(vocab, (num,))


def attention():
    return leaf(8, 4, 8), leaf(8, 2, 8), leaf(8, 2, 8), bounds(5, 3)


CALLS = {  # op -> its arguments, and the options of each call
    "approx_kl": lambda: ((leaf(9), leaf(9)), [{"estimator": kind} for kind in ("k1", "k2", "k3")]),
    "decode_attention": lambda: (
        (rows(3, 4, 8), rows(4, 2, 6, 8), rows(4, 2, 6, 8), torch.tensor([6, 0, 2], dtype=torch.int32)),
        [{}, {"scale": 0.3}, {"window": 2}],
    ),
    "discounted_returns": lambda: ((rows(8), bounds(5, 3)), [{}, {"gamma": 0.9}]),
    "gae": lambda: (
        (rows(8), rows(8), bounds(5, 3)),
        [{}, {"mask": mask(8), "gaps": "zero"}, {"bootstrap": rows(2), "gamma": 0.9, "lam": 0.8}],
    ),
    "group_advantages": lambda: (
        (rows(8), bounds(4, 4)),
        [{"kind": kind} for kind in ("grpo", "dr_grpo", "rloo")] + [{"eps": 0.1}],
    ),
    "kl_divergence": lambda: (
        (leaf(5, 11), leaf(5, 11)),
        [{"kind": kind} for kind in ("forward", "reverse", "js")] + [{"temperature": 0.7}],
    ),
    "linear_cross_entropy": lambda: (head(), [*head_options(), {"mask": mask(8)}, {"denominator": 5.0}]),
    "linear_dpo_loss": lambda: (
        (*head(), bounds(3, 2, 1, 2), rows(8)),
        [*head_options(), {"mask": mask(8)}, {"beta": 0.3, "label_smoothing": 0.1, "denominator": 5.0}],
    ),
    "linear_kl_divergence": lambda: (
        (leaf(5, 6), leaf(11, 6), leaf(5, 4), leaf(11, 4)),
        [
            *({"kind": kind} for kind in ("forward", "reverse", "js")),
            {"bias_p": leaf(11), "lora_q": (leaf(2, 4), leaf(11, 2), 0.5)},
            {"bias_q": leaf(11), "lora_p": (leaf(2, 6), leaf(11, 2), 0.5)},
            {"temperature": 0.7, "logit_scale": (0.5, 0.7), "logit_softcap": (3.0, None)},
            {"chunk_size": 2, "memory_budget": 3 * 2 * 11 * 4},
            {"batch_invariant": True},
        ],
    ),
    "linear_ppo_loss": lambda: (
        (*head(), rows(8), rows(8)),
        [
            *head_options(),
            {"mask": mask(8), "clip_range": (0.1, 0.3), "dual_clip": 2.0, "denominator": 5.0},
            {"entropy_coef": 0.1, "temperature": 0.7},
            {"temperature": torch.rand(8) + 0.5},
            *({"ref_logprobs": rows(8), "kl_coef": 0.2, "kl_estimator": kind} for kind in ("k2", "k3")),
        ],
    ),
    "linear_token_logprobs": lambda: (
        head(),
        [
            *head_options(),
            {"return_entropy": True, "return_logsumexp": True, "return_top1": True, "temperature": 0.7},
            {"temperature": torch.rand(8) + 0.5, "memory_budget": 3 * 11 * 4, "chunk_size": 2},
        ],
    ),
    "masked_whiten": lambda: ((rows(8),), [{}, {"mask": mask(8), "center": False}, {"eps": 0.1}]),
    "packed_attention": lambda: (
        attention(),
        [{}, {"scale": 0.3}, {"window": 2}, {"prefix_lengths": torch.tensor([0, 2], dtype=torch.int32)}],
    ),
    "pairwise_reward_loss": lambda: (
        (leaf(6), leaf(6)),
        [
            {},
            {"margin": rows(6), "label_smoothing": 0.1, "center_coef": 0.01},
            {"weights": torch.rand(6), "targets": torch.rand(6), "denominator": 5.0},
            {"chosen_rows": torch.tensor([4, 1]), "rejected_rows": torch.tensor([0, 5])},
        ],
    ),
    "ppo_advantages": lambda: (
        (rows(2), rows(8), rows(8), rows(8), bounds(5, 3)),
        [{"kl_coef": 0.1}, {"kl_coef": 0.1, "gamma": 0.9, "lam": 0.8, "mask": mask(8), "whiten": False}],
    ),
    "ppo_policy_loss": lambda: (
        (leaf(8), rows(8), rows(8)),
        [
            {},
            {"mask": mask(8), "clip_range": (0.1, 0.3), "dual_clip": 2.0, "denominator": 5.0},
            {"ratio": "sequence", "cu_seqlens": bounds(5, 3)},
        ],
    ),
    "ranking_loss": lambda: (
        (leaf(6), bounds(4, 2)),
        [
            *({"kind": kind} for kind in ("plackett_luce", "pairwise")),
            {"ties": torch.tensor([False, True, False, False, False, True]), "denominator": 5.0},
            {"rows": torch.tensor([3, 1, 0, 5, 4, 2])},
        ],
    ),
    "rms_norm": lambda: ((leaf(5, 8), leaf(8)), [{"eps": 1e-6}]),
    "rotary": lambda: ((leaf(5, 2, 8), rows(5, 8), rows(5, 8)), [{}]),
    "sample_tokens": lambda: (
        (rows(5, 11),),
        [
            {},
            {"seeds": torch.arange(5)},
            {"seeds": torch.arange(5), "positions": torch.arange(5), "temperature": 0.7},
            {"seeds": torch.arange(5), "top_k": 3, "top_p": 0.8, "min_p": 0.05},
        ],
    ),
    "silu_mul": lambda: ((leaf(5, 8), leaf(5, 8)), [{}]),
    "thin_linear": lambda: ((rows(5, 8), rows(11, 8)), [{}]),
    "token_logprobs": lambda: (
        (leaf(5, 11), torch.randint(11, (5,))),
        [
            {},
            {"temperature": 0.7, "return_entropy": True, "return_logsumexp": True},
            {"temperature": torch.rand(5) + 0.5},
        ],
    ),
    "value_loss": lambda: (
        (leaf(8), rows(8), rows(8)),
        [{}, {"mask": mask(8), "clip_range": 0.1, "denominator": 5.0}, {"clip_range": None}],
    ),
}


def tensors(value):
    """All tensors in arguments or outputs, in order."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def outputs_and_gradients(function, leaves):
    """What a list of calls gives, and the gradients of one weighted sum of all that is differentiable."""
    torch.manual_seed(1)
    outputs = tensors(function())
    summed = [o for o in outputs if o.requires_grad]
    if not leaves:
        assert not summed
        return outputs, []
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(o.shape, generator=generator).to(o.device) for o in summed]
    total = sum((o * w).sum() for o, w in zip(summed, weights, strict=True))
    return outputs, torch.autograd.grad(total, leaves)


def calls_of(name, device):
    with torch.device(device):
        return CALLS[name]()


def assert_compiles(name, args, calls, backend="aot_eager"):
    torch.compiler.reset()
    op = getattr(fastrlhf, name)
    leaves = [t for t in tensors([args, calls]) if t.requires_grad]
    assert bool(leaves) == bool(MATRIX[name].grads)

    def run():
        return [op(*args, **options) for options in calls]

    expected = outputs_and_gradients(run, leaves)
    found = outputs_and_gradients(torch.compile(run, fullgraph=True, backend=backend), leaves)
    assert len(expected[0]) >= len(calls)
    for ours, eager in zip(found[0] + list(found[1]), expected[0] + list(expected[1]), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_the_calls_give_every_option_of_every_op():
    assert CALLS.keys() == MATRIX.keys() - INTERNAL
    for name, call in CALLS.items():
        args, calls = call()
        parameters = inspect.signature(getattr(fastrlhf, name)).parameters
        given = set().union(*calls) | NOT_COMPILED.get(name, set()) | IN_A_GROUP.get(name, set())
        assert given == {*list(parameters)[len(args) :]}, name


@pytest.mark.parametrize("name", CALLS)
def test_every_option_compiles_to_one_graph_with_its_backward(name, device):
    assert_compiles(name, *calls_of(name, device))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch itself
def test_inductor_gives_the_same(device):
    assert_compiles("linear_ppo_loss", *calls_of("linear_ppo_loss", device), backend="inductor")


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", IN_A_GROUP)
def test_a_group_compiles(name, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        args, calls = CALLS[name]()
        assert_compiles(name, args, [{**calls[0], "group": dist.group.WORLD}])
    finally:
        dist.destroy_process_group()
