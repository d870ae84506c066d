"""PPO's advantages: against a loop over numbers, against the ops that it fuses, and small cases worked by hand."""

import statistics

import pytest
import torch
from compare import filled
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf import approx_kl, gae, masked_whiten, ppo_advantages


def cu(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def batch(*lengths, dtype=torch.float32):
    """Scores, logprobs, ref_logprobs, values and cu_seqlens of responses of these lengths."""
    logprobs, values = torch.randn(sum(lengths), dtype=dtype) - 3, torch.randn(sum(lengths), dtype=dtype)
    ref_logprobs = logprobs + 0.1 * torch.randn_like(logprobs)
    return torch.randn(len(lengths), dtype=dtype), logprobs, ref_logprobs, values, cu(*lengths)


def by_hand(scores, logprobs, ref_logprobs, values, cu_seqlens, kl_coef, gamma, lam):
    """Rewards and advantages of numbers: each advantage is summed up from its definition, without a recurrence."""
    rewards, advantages = [], []
    for n, score in enumerate(scores.tolist()):
        start, end = cu_seqlens[n].item(), cu_seqlens[n + 1].item()
        lp, ref, v = (x[start:end].tolist() for x in (logprobs, ref_logprobs, values))
        r = [
            -kl_coef * (a - b) + (score if t == len(lp) - 1 else 0)
            for t, (a, b) in enumerate(zip(lp, ref, strict=True))
        ]
        deltas = [r[t] + (gamma * v[t + 1] if t + 1 < len(v) else 0) - v[t] for t in range(len(v))]
        advantages += [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(v))) for t in range(len(v))]
        rewards += r
    return rewards, advantages


@given(st.lists(st.integers(1, 30), min_size=1, max_size=11), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_all_results_are_what_their_definitions_say(lengths, seed):
    torch.manual_seed(seed)
    args = batch(*lengths, dtype=torch.float64)
    rewards, advantages, returns, stats = ppo_advantages(*args, kl_coef=0.1, gamma=0.97, lam=0.9, whiten=False)
    expected_rewards, expected = by_hand(*args, 0.1, 0.97, 0.9)
    assert rewards.tolist() == pytest.approx(expected_rewards, rel=1e-12, abs=1e-12)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-11)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(expected, args[3].tolist(), strict=True)])
    kl = [a - b for a, b in zip(args[1].tolist(), args[2].tolist(), strict=True)]
    assert stats["kl"].item() == pytest.approx(sum(kl) / len(lengths))
    assert stats["rewards"].item() == pytest.approx(sum(expected_rewards) / len(lengths))
    assert stats["values"].item() == pytest.approx(statistics.fmean(args[3].tolist()))
    assert stats["returns"].item() == pytest.approx(statistics.fmean(returns.tolist()))
    assert stats["advantages"].item() == pytest.approx(statistics.fmean(expected))
    assert stats["advantages_std"].item() == pytest.approx(statistics.pstdev(expected), abs=1e-9)
    if len(args[3]) > 1:
        explained = 1 - statistics.pvariance(expected) / statistics.pvariance(returns.tolist())
        assert stats["explained_variance"].item() == pytest.approx(explained, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("whiten", [False, True])
def test_it_equals_the_ops_that_it_fuses(whiten):
    scores, logprobs, ref_logprobs, values, cu_seqlens = args = batch(*[50, 1, 700, 33] * 40)
    rewards, advantages, returns, _ = ppo_advantages(*args, kl_coef=0.05, gamma=0.99, lam=0.95, whiten=whiten)
    shaped = -0.05 * approx_kl(logprobs, ref_logprobs)
    shaped[cu_seqlens[1:].long() - 1] += scores
    expected, expected_returns = gae(shaped, values, cu_seqlens, gamma=0.99, lam=0.95)
    torch.testing.assert_close(rewards, shaped, rtol=0, atol=1e-6)
    torch.testing.assert_close(returns, expected_returns, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(advantages, masked_whiten(expected) if whiten else expected, rtol=1e-6, atol=1e-6)


def masked_by_hand(scores, logprobs, ref_logprobs, values, cu_seqlens, mask, kl_coef, gamma, lam):
    """Rewards and advantages of numbers, each token that counts looking for the next of its response that does."""
    rewards, advantages = [0.0] * len(mask), [0.0] * len(mask)
    for n, score in enumerate(scores.tolist()):
        following, value_after, advantage_after = score, 0.0, 0.0
        for t in range(cu_seqlens[n + 1].item() - 1, cu_seqlens[n].item() - 1, -1):
            if mask[t]:
                rewards[t] = following - kl_coef * (logprobs[t].item() - ref_logprobs[t].item())
                delta = rewards[t] + gamma * value_after - values[t].item()
                advantages[t] = advantage_after = delta + gamma * lam * advantage_after
                following, value_after = 0.0, values[t].item()
    return rewards, advantages


@given(st.lists(st.integers(0, 30), max_size=11), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_masked_tokens_are_as_cut_out(lengths, share, seed):
    torch.manual_seed(seed)
    args = batch(*lengths, dtype=torch.float64)
    mask = torch.rand(sum(lengths)) < share
    for tensor in args[1:4]:
        tensor[~mask] = torch.nan  # which must not be looked at
    options = {"kl_coef": 0.1, "gamma": 0.97, "lam": 0.9, "mask": mask}
    rewards, advantages, returns, stats = ppo_advantages(*args, **options, whiten=False)
    expected_rewards, expected = masked_by_hand(*args, mask.tolist(), 0.1, 0.97, 0.9)
    assert rewards.tolist() == pytest.approx(expected_rewards, rel=1e-12, abs=1e-12)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-11)
    with_mask = gae(rewards, args[3], args[4], mask=mask, gamma=0.97, lam=0.9)
    torch.testing.assert_close((advantages, returns), with_mask, rtol=1e-12, atol=1e-12)
    responses = sum(bool(part.any()) for part in mask.split(lengths)) if lengths else 0
    assert stats["rewards"].item() == pytest.approx(sum(expected_rewards) / max(responses, 1))
    assert stats["returns"].item() == pytest.approx((returns.sum() / max(int(mask.sum()), 1)).item())
    whitened = ppo_advantages(*args, **options)[1]
    torch.testing.assert_close(whitened, masked_whiten(advantages, mask), rtol=1e-9, atol=1e-9)


def test_the_score_of_a_response_in_which_nothing_counts_goes_nowhere():
    mask = torch.tensor([True, True, False, False, True])
    args = torch.tensor([1.0, 50.0, 2.0]), torch.zeros(5), torch.zeros(5), torch.zeros(5), cu(2, 2, 1)
    rewards, _, returns, stats = ppo_advantages(*args, kl_coef=0.1, mask=mask)
    assert rewards.tolist() == [0, 1, 0, 0, 2] and returns[2:4].tolist() == [0, 0] and stats["rewards"] == 1.5


def test_score_lands_on_the_last_token_and_the_penalty_on_every_token():
    logprobs, ref = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -2.0])
    rewards, *_ = ppo_advantages(torch.tensor([10.0, 20.0]), logprobs, ref, torch.zeros(3), cu(2, 1), kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([-0.05, 10.0, 20.1]))


def test_rewards_of_a_response_sum_to_score_minus_its_kl():
    scores, logprobs, ref_logprobs, values, cu_seqlens = batch(9)
    rewards, _, _, stats = ppo_advantages(scores, logprobs, ref_logprobs, values, cu_seqlens, kl_coef=0.2)
    torch.testing.assert_close(rewards.sum(), scores[0] - 0.2 * (logprobs - ref_logprobs).sum())
    torch.testing.assert_close(stats["rewards"], rewards.sum())


def test_whitened_advantages_have_mean_0_and_biased_variance_1():
    _, advantages, _, stats = ppo_advantages(*batch(*[20] * 300), kl_coef=0.05)
    assert abs(advantages.double().mean()) < 1e-6 and abs(advantages.double().var(correction=0) - 1) < 1e-5
    assert stats["advantages_std"] != 1


def test_nan_goes_towards_the_start_of_its_response_and_is_shown_by_whitening():
    scores, logprobs, ref_logprobs, values, cu_seqlens = batch(3, 3)
    logprobs[1] = float("nan")
    args = scores, logprobs, ref_logprobs, values, cu_seqlens
    rewards, advantages, _, stats = ppo_advantages(*args, kl_coef=0.1, whiten=False)
    assert rewards.isnan().tolist() == [False, True, False, False, False, False]
    assert advantages.isnan().tolist() == [True, True, False, False, False, False]
    assert stats["kl"].isnan() and stats["values"].isfinite()
    assert ppo_advantages(*args, kl_coef=0.1)[1].isnan().all()


def test_no_responses_give_nothing():
    empty = torch.empty(0)
    rewards, advantages, returns, stats = ppo_advantages(empty, empty, empty, empty, cu(), kl_coef=0.1)
    assert rewards.shape == advantages.shape == returns.shape == (0,) and stats["kl"] == stats["returns"] == 0


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=70), st.integers(2, 7))
@settings(max_examples=10, deadline=None)
def test_number_of_threads_does_not_change_a_bit(lengths, threads):
    args, before = batch(*lengths), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ppo_advantages(*args, kl_coef=0.1)
        torch.set_num_threads(threads)
        together = ppo_advantages(*args, kl_coef=0.1)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone[:3], together[:3], strict=True))
    torch.testing.assert_close(together[3], alone[3], rtol=0, atol=0, equal_nan=True)


def test_half_precision_is_computed_in_float32():
    *tensors, cu_seqlens = batch(4, 5)
    half = [x.bfloat16() for x in tensors]
    actual = ppo_advantages(*half, cu_seqlens, kl_coef=0.1)
    expected = ppo_advantages(*(x.float() for x in half), cu_seqlens, kl_coef=0.1)
    assert all(torch.equal(a, b) for a, b in filled(zip(actual[:3], expected[:3], strict=True)))


def part_of_a_group(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    *args, _ = torch.load(f"{folder}/{rank}.pt")
    result = ppo_advantages(*args, kl_coef=0.1, group=torch.distributed.group.WORLD)
    torch.save(result[1], f"{folder}/advantages_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_of_a_group_whiten_as_one(tmp_path):
    parts = batch(30, 7), batch(5, 90, 2)
    for rank, part in enumerate(parts):
        torch.save((*part, rank), tmp_path / f"{rank}.pt")
    torch.multiprocessing.spawn(part_of_a_group, (str(tmp_path),), nprocs=2)
    together = torch.cat([torch.load(tmp_path / f"advantages_{rank}.pt") for rank in (0, 1)])
    whole = [torch.cat(both) for both in zip(*(part[:4] for part in parts), strict=True)]
    expected = ppo_advantages(*whole, cu(30, 7, 5, 90, 2), kl_coef=0.1)[1]
    torch.testing.assert_close(together, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"values": torch.zeros(3)}, ValueError, "values (3,) must have the same shape"),
        ({"scores": torch.zeros(3)}, ValueError, "scores must be (N,) = (2,), got (3,)"),
        ({"ref_logprobs": torch.zeros(4).double()}, TypeError, "ref_logprobs must be float32, got float64"),
        ({"scores": torch.zeros(2, dtype=torch.int64)}, TypeError, "scores must be float32, float64, got int64"),
        ({"logprobs": torch.zeros(4, requires_grad=True)}, ValueError, "logprobs gets no gradient"),
        ({"values": torch.zeros(4, device="meta")}, ValueError, "must be on one device"),
        ({"cu_seqlens": cu(2, 1)}, ValueError, "cu_seqlens must rise from 0 to 4"),
        ({"cu_seqlens": cu(4, 0)}, ValueError, "sequence 1 has no tokens"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask (3,) must have the same shape"),
        ({"mask": torch.ones(4)}, TypeError, "mask must be bool, got float32"),
        ({"mask": torch.ones(4, dtype=torch.bool), "cu_seqlens": cu(2, 1)}, ValueError, "cu_seqlens must rise from 0"),
        ({"kl_coef": -0.1}, ValueError, "kl_coef must be a number from 0 up, got -0.1"),
        ({"lam": 2}, ValueError, "lam=2"),
    ],
)
def test_bad_input_is_named(change, error, text):
    good = {name: torch.zeros(4) for name in ("logprobs", "ref_logprobs", "values")}
    good |= {"scores": torch.zeros(2), "cu_seqlens": cu(3, 1), "kl_coef": 0.1}
    with pytest.raises(error) as caught:
        ppo_advantages(**{**good, **change})
    assert "ppo_advantages: " in str(caught.value) and text in str(caught.value)
