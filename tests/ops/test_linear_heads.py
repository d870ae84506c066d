"""What holds for every op on a linear head: batch invariance, work left out, tied and distributed weights."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from compare import filled
from heads import LOSSES, D, V, factors, inputs, logprobs, products
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.profiler import profile

from fastrlhf import linear_ppo_loss, linear_token_logprobs
from fastrlhf.ops._registry import OPS, SERVING


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("head", ["plain", "softcap", "rank 1", "rank 7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_batch_invariant_rows_do_not_depend_on_the_others(loss, dtype, head, threads):
    hidden, weight, targets = inputs(200, dtype)
    options = {"logit_softcap": 5.0} if head == "softcap" else {}
    if head.startswith("rank"):
        options = {"lora": (*factors(int(head[5:]), dtype), 0.5)}
    results = []
    for rows in (slice(70, 77), slice(70, 71), slice(3, 77), slice(0, 128), slice(13, 200), slice(0, 200)):
        leaf = hidden[rows].clone().requires_grad_()
        total, outputs = loss(leaf, weight, targets[rows], chunk_size=64, batch_invariant=True, **options)
        row = 70 - rows.start
        results.append([torch.autograd.grad(total, leaf)[0][row], *(output[row] for output in outputs)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_batch_invariance_changes_no_result_but_for_rounding(loss):
    hidden, weight, targets = inputs(100)
    results = []
    for options in ({"chunk_size": 64, "batch_invariant": True}, {}):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        results.append(torch.autograd.grad(loss(*leaves, targets, **options)[0], leaves))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_batch_invariance_wants_tiles_of_64_rows(loss):
    with pytest.raises(ValueError, match="with batch_invariant chunk_size must be a multiple of 64, got 100"):
        loss(*inputs(3), chunk_size=100, batch_invariant=True)


def test_ppo_rows_that_get_no_gradient_cost_no_backward_product():
    """Clipped rows and rows of advantage 0, such as those of a group that agrees."""
    hidden, weight, targets = (t.requires_grad_() if t.is_floating_point() else t for t in inputs(60))
    old = linear_token_logprobs(hidden, weight, targets).detach()
    advantages = torch.where(torch.arange(60) < 32, torch.randn(60), 0.0)  # the rows of the last chunk: nothing
    old[10:20] = old[10:20] - torch.sign(advantages[10:20])  # past the clip range, so held
    made = []

    def run(**options):
        loss, _ = linear_ppo_loss(hidden, weight, targets, old, advantages, chunk_size=30, **options)
        made.append(torch.autograd.grad(loss, (hidden, weight)))

    assert products(run) == [[30, D], [20, V], [V, 20], [30, D], [2, V], [V, 2]]
    run(entropy_coef=1e-30)  # every row has a gradient now, though none that float32 shows
    for left_out, full in zip(*made, strict=True):
        torch.testing.assert_close(left_out, full, rtol=1e-5, atol=1e-7)
    assert not made[0][0][10:20].any() and not made[0][0][32:].any()


@pytest.mark.parametrize(
    ("rows", "shapes"),
    [
        (0, [[45, D]] * 2 + [[45, D], [45, V], [V, 45]] * 2),
        (45, [[45, D]] * 2 + [[45, V], [V, 45]] + [[45, D], [45, V], [V, 45]]),
        (90, [[45, D]] * 2 + [[45, V], [V, 45]] * 2),
        (1000, [[45, D]] * 2 + [[45, V], [V, 45]] * 2),
    ],
)
def test_logits_that_the_budget_keeps_are_not_made_again(rows, shapes):
    hidden, weight, targets = (t.requires_grad_() if t.is_floating_point() else t for t in inputs(90))
    expected = torch.autograd.grad(logprobs(hidden, weight, targets, chunk_size=45)[0], (hidden, weight))
    grads = []

    def run():
        total, _ = logprobs(hidden, weight, targets, chunk_size=45, memory_budget=rows * V * 4)
        grads.extend(torch.autograd.grad(total, (hidden, weight)))

    assert products(run) == shapes
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_the_budget_keeps_nothing_for_rows_that_need_no_gradient():
    with profile(profile_memory=True) as recorded:
        linear_token_logprobs(*inputs(90), chunk_size=10, memory_budget=2**40)
    assert max(e.nbytes() for e in recorded.kineto_results.events() if e.name() == "[memory]") < 90 * V * 4


def test_rows_kept_and_rows_left_out_go_together():
    hidden, weight, targets = inputs(90)
    mask, results = torch.rand(90) < 0.5, []
    for budget in (0, 40 * V * 4):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        outputs = linear_token_logprobs(*leaves, targets, chunk_size=16, memory_budget=budget)
        results.append(torch.autograd.grad(outputs[mask].sum(), leaves))
    for ours, plain in filled(zip(*results, strict=True)):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_tied_weight_gets_both_its_gradients(loss):
    _, weight, targets = inputs(50)
    tokens = torch.randint(V, (50,))

    def both(weight, head):
        return loss(F.embedding(tokens, weight).tanh(), head, targets)[0]

    tied = weight.clone().requires_grad_()
    apart = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    (actual,) = torch.autograd.grad(both(tied, tied), tied)
    torch.testing.assert_close(actual, sum(torch.autograd.grad(both(*apart), apart)))


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_distributed_weight_is_gathered_and_gets_a_distributed_gradient(loss, mesh):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    hidden, weight, targets = inputs(50)
    hidden.requires_grad_()
    plain, spread = weight.clone().requires_grad_(), distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    a, b = factors(4)
    expected = loss(hidden, plain, targets, lora=(a, b, 0.5))[0]
    actual = loss(hidden, spread, targets, lora=(a, distribute_tensor(b, mesh, [Shard(0)]), 0.5))[0]
    assert torch.equal(actual, expected)
    wanted, (grad_hidden, grad) = (
        torch.autograd.grad(total, (hidden, leaf)) for total, leaf in ((expected, plain), (actual, spread))
    )
    assert isinstance(grad, DTensor) and grad.placements == (Shard(0),)
    assert torch.equal(grad_hidden, wanted[0]) and torch.equal(grad.to_local(), wanted[1])


@pytest.mark.parametrize("name", ["linear_token_logprobs", "linear_kl_divergence"])
def test_a_forward_that_is_no_loss_reads_no_number_on_the_host(name):
    for args in filled(OPS[name].samples("cpu", torch.float32)):
        with FakeTensorMode() as mode:  # in which tensors have no numbers: asking for one raises
            outputs = SERVING[name]["cuda"](*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        assert all(isinstance(output, FakeTensor) for output in filled(outputs))
