import io
import math
import sys

import pytest
import torch

from fastrlhf.errors import NonFiniteError
from fastrlhf.runtime.optim import Optimizer, check_finite, learning_rate_at

OPTIONS = dict(
    learning_rate=0.1, num_steps=10, schedule="cosine", warmup_ratio=0.2, weight_decay=0.1, eps=1e-5, max_grad_norm=1.0
)


def tiny(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))


def gradient(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("schedule", "torch_schedule"),
    [
        ("cosine", lambda adam: torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=8)),
        ("linear", lambda adam: torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=8)),
        ("constant", lambda adam: torch.optim.lr_scheduler.ConstantLR(adam, factor=1.0)),
    ],
)
def test_schedule_after_the_warm_up_is_that_of_torch(schedule, torch_schedule):
    adam = torch.optim.SGD(tiny().parameters(), lr=0.5)
    other = torch_schedule(adam)
    for step in range(2, 10):
        ours = learning_rate_at(step, peak=0.5, num_steps=10, num_warmup_steps=2, schedule=schedule)
        assert ours == pytest.approx(adam.param_groups[0]["lr"], abs=1e-9)
        adam.step()
        other.step()


def test_warm_up_rises_linearly_to_the_peak():
    rates = [learning_rate_at(s, peak=1.0, num_steps=9, num_warmup_steps=4, schedule="linear") for s in range(5)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_steps_are_those_of_adamw_with_decay_on_matrices_only():
    model, theirs = tiny(), tiny()
    optimizer = Optimizer(model, **OPTIONS)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-5,
        foreach=False,
        fused=False,
    )
    for step in range(5):
        gradient(model, step)
        gradient(theirs, step)
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in theirs.parameters()))
        for parameter in theirs.parameters():
            parameter.grad /= max(norm, 1.0)
        for group in adam.param_groups:
            group["lr"] = learning_rate_at(step, peak=0.1, num_steps=10, num_warmup_steps=2, schedule="cosine")
        adam.step()
        assert optimizer.step("here").item() == pytest.approx(norm, rel=1e-6)
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    model = tiny()
    before = [p.clone() for p in model.parameters()]
    optimizer = Optimizer(model, **OPTIONS)
    gradient(model, 0)
    model[0].weight.grad[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="norm of the gradient is nan at step 3, rows 4 to 7"):
        optimizer.step("step 3, rows 4 to 7")
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(NonFiniteError, match="the loss is inf at step 1"):
        check_finite("the loss", torch.tensor(math.inf), "step 1")


def test_a_restored_optimizer_takes_the_same_steps_bit_for_bit(tmp_path):
    model = tiny()
    optimizer = Optimizer(model, **OPTIONS)
    for step in range(3):
        gradient(model, step)
        optimizer.step("")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = tiny(seed=1)
    other.load_state_dict(state["model"])
    restored = Optimizer(other, **OPTIONS)
    restored.load_state_dict(state["optimizer"])
    for step in range(3, 6):
        for m, o in ((model, optimizer), (other, restored)):
            gradient(m, step)
            o.step("")
    assert restored.learning_rate == optimizer.learning_rate
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def big(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(128, 64)


def test_moments_of_a_byte_stay_near_exact_ones_and_resume_exactly():
    pytest.importorskip("bitsandbytes", reason="pip install 'fastrlhf[bitsandbytes]'")
    models = [big() for _ in range(3)]
    optimizers = [Optimizer(model, **OPTIONS, kind=kind) for model, kind in zip(models, KINDS, strict=True)]
    for step in range(8):
        if step == 4:  # the third goes on from what the second has saved
            models[2].load_state_dict(models[1].state_dict())
            optimizers[2].load_state_dict(through_a_file(optimizers[1].state_dict()))
        for model, optimizer in zip(models, optimizers, strict=True):
            gradient(model, step)
            optimizer.step("here")
    assert all(map(torch.equal, models[1].parameters(), models[2].parameters()))
    start, exact, eight = (m.weight.detach() for m in (big(), *models[:2]))
    assert (eight - exact).norm() < 0.1 * (exact - start).norm() and not torch.equal(eight, exact)
    sizes = [sum(t.nbytes for t in optimizer.adam.state[m.weight].values() if torch.is_tensor(t) and t.dim() == 2)
             for m, optimizer in zip(models[:2], optimizers[:2], strict=True)]  # fmt: skip
    assert sizes[0] == 4 * sizes[1] == 8 * models[0].weight.numel()


KINDS = ("adamw", "adamw8bit", "adamw8bit")


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ModuleNotFoundError, match=r"optimizer=adamw8bit: pip install 'fastrlhf\[bitsandbytes\]'"):
        Optimizer(big(), **OPTIONS, kind="adamw8bit")
