"""What a policy answers to held-out prompts, how that is judged, and how sure a difference is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastrlhf.data import Prompt
from fastrlhf.data.template import eos_token_ids
from fastrlhf.errors import UserError
from fastrlhf.generation.engine import Engine, Sample, Sampling
from fastrlhf.models.policy import Policy, autocasting
from fastrlhf.models.shared_prompts import pack_responses
from fastrlhf.ops import approx_kl
from fastrlhf.packing import Packed
from fastrlhf.stats.accuracy import hits
from fastrlhf.stats.calibration import Reliability, reliability
from fastrlhf.stats.means import Mean

Judge = Callable[[Sequence[Prompt], Sequence[Sample], Packed], Tensor]  # such as a Scorer


@dataclass(frozen=True)
class Answers:
    """Responses to prompts and how each is judged.

    batch: the pack of prompts and responses; texts: N responses as text; judgements: (N,) float32 of each judge"""

    samples: list[Sample]
    batch: Packed
    texts: list[str]
    judgements: dict[str, Tensor]

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of the responses, their end included."""
        return torch.tensor([len(sample.response) for sample in self.samples])

    @property
    def finished(self) -> Tensor:
        """(N,) bool, whether the response ended by itself."""
        return torch.tensor([sample.finished for sample in self.samples])


def answer(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    judges: Mapping[str, Judge],
    *,
    sampling: Sampling,
    seeds: Sequence[int],
    max_slots: int = 64,
    share_prompts: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Answers:
    """Returns the policy's response to each prompt, judged.

    judges: by name, what scores a response
    seeds: one a prompt; two policies with the same seeds draw with the same random numbers, which makes their
    difference on a prompt less noisy
    share_prompts: whether judges read a prompt that neighbours have in common once
    max_slots, progress: those of `Engine`"""
    device = policy.model.device
    ends = eos_token_ids(tokenizer, policy.model)
    engine = Engine(policy.model, eos_token_ids=ends, max_slots=max_slots, adapter=policy.adapter)
    with autocasting(device, policy.autocast):
        samples = engine.generate([prompt.tokens for prompt in prompts], sampling, seeds=seeds, progress=progress)
    responses = [sample.response for sample in samples]
    batch = pack_responses([p.tokens for p in prompts], responses, share_prompts=share_prompts, device=device)
    texts = response_texts(tokenizer, [prompt.tokens for prompt in prompts], responses)
    judgements = {name: judge(prompts, samples, batch).float().cpu() for name, judge in judges.items()}
    return Answers(samples, batch, texts, judgements)


def response_texts(tokenizer: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[str]:
    """Returns the text of each response as it stands behind its prompt, to be read again as part of a row of data.

    Tokenizers that mark the beginning of a word, as SentencePiece does, leave out the space before the first word of
    what they decode: "2 + 2 =" and "four" for "2 + 2 = four". Behind a special token, such as the start of a turn, that
    space is none of the text."""
    alone: list[str] = tokenizer.batch_decode(responses, skip_special_tokens=True)
    special, texts = set(tokenizer.all_special_ids), []
    for prompt, response, text in zip(prompts, responses, alone, strict=True):
        if prompt and prompt[-1] not in special:
            before, whole = (
                tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                for tokens in (list(prompt), [*prompt, *response])
            )
            text = whole.removeprefix(before) if whole.startswith(before) else text
        texts.append(text)
    return texts


@torch.no_grad()
def kl_of_responses(
    policy: Policy, reference: Policy, answers: Answers, *, temperature: float, max_tokens: int
) -> Tensor:
    """Returns log p(response) - log p_reference(response) (N,), nats, of responses that `policy` sampled.

    Its mean is an unbiased estimate of the KL divergence of the policy from the reference over whole responses."""
    parts = answers.batch.microbatches(max_tokens)
    ours, theirs = (torch.cat([p(part, temperature=temperature) for part in parts]) for p in (policy, reference))
    per_token = approx_kl(ours, theirs, estimator="k1").cpu()
    return torch.stack([piece.sum() for piece in per_token.split(answers.batch.response_lengths)])


def best_of_n(scores: Tensor, gold: Tensor) -> Tensor:
    """Returns the gold reward (P,) of the response with the best score. scores, gold: (P, n), n responses a prompt."""
    return gold.gather(1, scores.argmax(1, keepdim=True))[:, 0]


def best_of_n_kl(n: int) -> float:
    """Returns log n - (n - 1) / n, nats: an upper bound on the KL of best-of-n from the policy that it draws from.

    Source: Stiennon et al., arXiv 2009.01325; that it is a bound and not the value: Beirami et al., 2401.01879."""
    if n < 1:
        raise UserError(f"best_of_n_kl: n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def calibration(scores: Tensor, gold: Tensor, *, num_bins: int = 5) -> Reliability:
    """Returns how often the gold reward agrees with the reward model, by how sure the model is.

    All pairs of the n responses to each prompt count, but those that the gold reward ties. Bins hold equally many.
    scores, gold: (P, n)"""
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    margin = (scores[:, first] - scores[:, second]).flatten().double()
    truth = (gold[:, first] - gold[:, second]).flatten().double()
    margin, truth = margin[truth != 0], truth[truth != 0]
    return reliability(margin.abs().sigmoid(), hits(margin * truth.sign()), num_bins=num_bins)


def compare(before: Answers, after: Answers, kl: Tensor, *, num_prompts: int) -> dict[str, Any]:
    """Returns the summary of two policies' answers to the same prompts: means, and differences paired by prompt.

    A prompt's value is the mean of its answers, so standard errors are over prompts.
    before, after: answers to all prompts, then again to all, and so on; kl: (N,) of `after`, from `kl_of_responses`"""
    summary: dict[str, Any] = {"kl": asdict(Mean.of(kl.view(-1, num_prompts).mean(0)))}
    for name in before.judgements:
        first, second = (each.judgements[name].view(-1, num_prompts).mean(0) for each in (before, after))
        columns = {"before": first, "after": second, "difference": second - first}
        summary[name] = {when: asdict(Mean.of(values)) for when, values in columns.items()}
    for when, answers in (("before", before), ("after", after)):
        summary[f"eos_rate_{when}"] = answers.finished.double().mean().item()
        summary[f"length_{when}"] = answers.lengths.double().mean().item()
        summary[f"distinct_{when}"] = len(set(answers.texts)) / len(answers.texts)
    return summary


def compare_best_of_n(scores: Tensor, gold: Tensor, gold_after: Tensor) -> dict[str, Any]:
    """Returns the summary of best-of-n by the reward model, beside the policy's gold rewards on the same prompts.

    scores, gold: (P, n) of n responses a prompt of the policy before; gold_after: (P,) of the policy after. Differences
    are to the mean of a prompt's n responses."""
    best, drawn = best_of_n(scores, gold), gold.mean(1)
    return {
        "n": gold.shape[1],
        "gold": asdict(Mean.of(best)),
        "difference": asdict(Mean.of(best - drawn)),
        "policy_difference": asdict(Mean.of(gold_after - drawn)),
        "kl_bound": best_of_n_kl(gold.shape[1]),
    }
