"""PPO's policy loss with KL and entropy under a linear head, its gradient made while the logits of a chunk exist."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrlhf.ops._check import (
    computed_in,
    denominator_of,
    dtype_in,
    has_shape,
    one_or_all,
    same_device,
    temperature_of,
    widen,
)
from fastrlhf.ops._linear import GRADIENTS, SCHEMA, Gradients, Head, even_cuts, if_fused
from fastrlhf.ops._linear_backward import LOGITS
from fastrlhf.ops._linear_inputs import check_targets, head_of, wanted_gradients
from fastrlhf.ops._linear_inputs import samples as head_samples
from fastrlhf.ops._linear_loss import fake, gradients_ref, kept_rows, loss_in_chunks, save_gradients, scale_gradients
from fastrlhf.ops._registry import op
from fastrlhf.ops._surrogate import STATS as CLIP_STATS
from fastrlhf.ops._surrogate import clip_bounds
from fastrlhf.ops.approx_kl import ESTIMATORS, approx_kl_ref, kl_slope
from fastrlhf.ops.linear_token_logprobs import linear_token_logprobs_ref
from fastrlhf.ops.ppo_policy_loss import ppo_policy_loss_ref

STATS = ("policy_loss", "entropy", "kl", *CLIP_STATS)


def linear_ppo_loss_ref(*args: Any) -> tuple[Tensor, ...]:
    head, (targets, old_logprobs, advantages, ref_logprobs, mask, temperature, *options, wanted) = Head.split(args)
    clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator, denominator = options
    kept, temperature = kept_rows(mask, targets), temperature.expand(targets.shape[0])
    count = denominator or max(1, kept.shape[0])
    old, advantages = old_logprobs[kept], advantages[kept]

    def terms(head: Head) -> tuple[Tensor, Tensor]:
        logprobs, entropies, *_ = linear_token_logprobs_ref(
            *head.rows(kept), targets[kept], temperature[kept], LOGITS, 0
        )
        clipped, stats, _ = ppo_policy_loss_ref(logprobs, old, advantages, None, clip_low, clip_high, dual_clip, count)
        kl, entropy = torch.zeros_like(clipped), entropies.sum() / count
        if ref_logprobs is not None:
            kl = approx_kl_ref(logprobs, ref_logprobs[kept], kl_estimator).sum() / count
        loss = clipped + kl_coef * kl - entropy_coef * entropy
        return loss, torch.cat([torch.stack([clipped, entropy, kl]), stats]).detach()

    return *terms(head), *gradients_ref(lambda head: terms(head)[0], head, wanted)


def _forward_chunks(*args: Any) -> tuple[Tensor, ...]:
    head, (targets, old_logprobs, advantages, ref_logprobs, mask, temperature, *options, wanted) = Head.split(args)
    *clip, entropy_coef, kl_coef, kl_estimator, denominator = options
    kept = kept_rows(mask, targets)
    count = denominator or max(1, kept.shape[0])
    old, advantages = old_logprobs[kept], advantages[kept]
    ref = None if ref_logprobs is None else ref_logprobs[kept]

    def clipped(rows: slice, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.fastrlhf.ppo_policy_loss(logprobs, old[rows], advantages[rows], None, *clip, count)

    def upstream(rows: slice, logprobs: Tensor, entropy: Tensor) -> list[Tensor | None]:
        *_, grad = clipped(rows, logprobs)
        if ref is not None and kl_coef:
            grad = grad + kl_coef / count * kl_slope(logprobs, ref[rows], kl_estimator)
        return [grad, torch.full_like(entropy, -entropy_coef / count) if entropy_coef else None]

    cuts = even_cuts(0, kept.shape[0], head.chunk_size)
    logprobs, entropies, grads = loss_in_chunks(head, targets, temperature, kept, wanted, cuts, upstream)
    policy_loss, stats, _ = clipped(slice(None), logprobs)
    kl, entropy = torch.zeros_like(policy_loss), entropies.sum() / count
    if ref is not None:
        kl = torch.ops.fastrlhf.approx_kl(logprobs, ref, kl_estimator).sum() / count
    loss = policy_loss.clone()
    if kl_coef:
        loss += kl_coef * kl
    if entropy_coef:  # so that an infinite entropy or KL stays out of a loss that has no such term
        loss -= entropy_coef * entropy
    return loss, torch.cat([torch.stack([policy_loss, entropy, kl]), stats]), *grads


def samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for head, targets, temperature in head_samples(device, dtype):
        wanted = [t is not None for t in head.tensors]
        logprobs, *_ = linear_token_logprobs_ref(*head, targets, temperature, LOGITS, 0)
        noise = torch.randn(3, *targets.shape, generator=generator).to(logprobs)
        old, advantages, ref = logprobs + 0.3 * noise[0], noise[1], logprobs + 0.3 * noise[2]
        mask = (torch.rand(targets.shape, generator=generator) < 0.6).to(device)
        common = *head, targets, old, advantages
        yield *common, None, None, temperature, 0.2, 0.2, None, 0.0, 0.0, 2, None, wanted
        yield *common, None, mask, temperature, 0.2, 0.28, 1.4, 0.05, 0.0, 2, None, wanted
        for estimator in (1, 2, 3):
            yield *common, ref, mask, temperature, 0.2, 0.2, None, 0.01, 0.1, estimator, 7.0, wanted
    yield *common, ref, torch.zeros_like(mask), temperature, 0.2, 0.2, None, 0.01, 0.1, 2, None, wanted


_op = op(
    f"linear_ppo_loss({SCHEMA}, Tensor targets, Tensor old_logprobs, Tensor advantages, Tensor? ref_logprobs,"
    " Tensor? mask, Tensor temperature, float clip_low, float clip_high, float? dual_clip, float entropy_coef,"
    f" float kl_coef, int kl_estimator, float? denominator, bool[] wanted) -> (Tensor, Tensor, {GRADIENTS})",
    ref=_forward_chunks,
    fake=fake(len(STATS)),
    cpu=_forward_chunks,  # native in that a chunk goes through the kernels of token_logprobs and ppo_policy_loss
    cuda=if_fused(_forward_chunks),
    reference=linear_ppo_loss_ref,
    samples=samples,
    grads=Gradients._fields,
    setup_context=save_gradients,
    backward=scale_gradients,
)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    clip_range: float | tuple[float, float] = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k2",
    temperature: float | Tensor = 1.0,
    denominator: float | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int = 512,
    batch_invariant: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, stats) of PPO's policy with logits = hidden weight^T + bias, made a chunk of rows at a time.

    loss = `ppo_policy_loss`(logprobs, ...) + kl_coef mean(`approx_kl`(logprobs, ref_logprobs))
        - entropy_coef mean(entropy), with logprobs and entropy as of `linear_token_logprobs`; a mean is the sum over
        the mask / denominator.

    hidden: (T, D) float32|float64|bfloat16|float16, rows that predict the targets
    weight: (V, D) like hidden, as in `linear_token_logprobs`
    targets: (T,) int64, in [0, V) where the mask is True; elsewhere than on the CPU a target out of range gives NaN
    old_logprobs, advantages, ref_logprobs: (T,) float32 (float64 for float64); half precision becomes float32
    bias: (V,) like hidden
    lora: (a, b, scale), a low-rank change of the weight, as in `linear_token_logprobs`
    mask: (T,) bool, True where a row counts; other rows are not computed and get gradient 0
    clip_range, dual_clip: as in `ppo_policy_loss`, whose ratio of a whole sequence (GSPO) there is not here: a ratio is
        that of a token
    kl_estimator: k1, k2 or k3. Over samples of the policy the mean gradient of k2 is that of KL(policy || reference);
        that of k3 is of KL(reference || policy), and that of k1 is 0
    temperature: a number or (T,), above 0
    denominator: the number of rows of the whole optimizer step, so that the losses and stats of micro-batches add up
        to those of the whole; without it the number of rows that count here
    logit_scale, logit_softcap, chunk_size, batch_invariant: as in `linear_token_logprobs`

    stats, detached: those of `ppo_policy_loss`, and the means policy_loss (without the other terms), entropy and, given
    ref_logprobs, kl. With nothing to count loss and stats are 0.

    Gradients are made as in `linear_cross_entropy`: in the forward, three matrix products, one less for a frozen head.
    The log-ratio is not clamped; NaN in, NaN out where the mask is True. Deterministic.
    Raises: ValueError for shapes, devices, targets or options that do not fit, TypeError for dtypes.
    Source: Schulman et al., arXiv 1707.06347, equations 7 and 9.
    """
    name = "linear_ppo_loss"
    head = head_of(name, hidden, weight, bias, lora, logit_scale, logit_softcap, chunk_size, batch_invariant)
    check_targets(name, head, targets, mask)
    temperature = temperature_of(name, temperature, hidden)
    one_or_all(name, temperature, targets.shape[0])
    old_logprobs, advantages = widen(old_logprobs), widen(advantages)
    ref_logprobs = None if ref_logprobs is None else widen(ref_logprobs)
    rows = {"old_logprobs": old_logprobs, "advantages": advantages, "ref_logprobs": ref_logprobs}
    same_device(name, hidden=hidden, temperature=temperature, **rows)
    for row_name, row in rows.items():
        if row is not None:
            dtype_in(name, row_name, row, (computed_in(hidden),))
            has_shape(name, row_name, row, targets.shape, "(T,)")
    bounds = clip_bounds(name, clip_range, dual_clip)
    for option, value in (("entropy_coef", entropy_coef), ("kl_coef", kl_coef)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: {option} must be a number from 0 up, got {value}")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"{name}: kl_coef = {kl_coef} needs ref_logprobs")
    if kl_estimator not in ESTIMATORS:
        raise ValueError(f"{name}: kl_estimator must be {', '.join(ESTIMATORS)}, got {kl_estimator!r}")
    denominator_of(name, denominator)
    inputs = *head, targets, *rows.values(), mask, temperature, *bounds, entropy_coef, kl_coef
    loss, values, *_ = _op(*inputs, ESTIMATORS[kl_estimator], denominator, wanted_gradients(*head.tensors))
    stats = dict(zip(STATS, values.unbind(), strict=True))
    if ref_logprobs is None:
        del stats["kl"]
    return loss, stats
