"""Generation: our engine against transformers' `generate` with its dynamic and static caches, for equal work.

A random Llama of 10.6 million parameters, 64 prompts of 32 to 128 tokens, responses of 8 to 128 tokens (log-normal, so
that most rows of a padded batch finish early). Every response is made to end at its target length on both sides.
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from benchmarks.harness import Report, compare, expect_close
from fastrlhf.attention import ATTENTION
from fastrlhf.rollout import Engine, Sampling

NUM_PROMPTS, MAX_NEW, VOCAB, EOS = 64, 128, 8192, 2
SAMPLE = {"do_sample": True, "top_k": 0, "top_p": 1.0}


class EndAt(LogitsProcessor):
    """Forbids EOS before each row's target length and forces it there."""

    def __init__(self, prompt_width: int, targets: torch.Tensor) -> None:
        self.prompt_width, self.targets = prompt_width, targets

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = self.targets <= input_ids.shape[1] - self.prompt_width + 1
        scores[:, EOS] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, EOS] = 0.0
        return scores


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def main() -> None:
    report = Report("generation")
    theirs = make_model()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation(ATTENTION)
    prompts = [torch.randint(3, VOCAB, (int(n),)).tolist() for n in torch.randint(32, 129, (NUM_PROMPTS,))]
    targets = (torch.randn(NUM_PROMPTS) * 0.6 + 4.0).exp().clamp(8, MAX_NEW).long()
    ids, mask = left_padded(prompts)
    engine = Engine(ours, eos_token_ids=(), max_slots=NUM_PROMPTS)
    seeds, limits = range(NUM_PROMPTS), targets.tolist()

    def fastrlhf() -> list:
        return engine.generate(prompts, Sampling(MAX_NEW), seeds=seeds, limits=limits)

    def generate(**options) -> torch.Tensor:
        processors = LogitsProcessorList([EndAt(ids.shape[1], targets)])
        given = {"attention_mask": mask, "logits_processor": processors, "max_new_tokens": MAX_NEW}
        return theirs.generate(ids, **given, **options)

    def check() -> float:
        greedy = engine.generate(prompts, Sampling(MAX_NEW, greedy=True), seeds=seeds, limits=limits)
        expected = generate(do_sample=False)[:, ids.shape[1] :]
        same = [s.response[:-1] == row[: n - 1].tolist() for s, row, n in zip(greedy, expected, limits, strict=True)]
        print(f"greedy: {sum(same)} of {len(same)} responses are those of generate, token for token")
        error = 0.0
        for sample in fastrlhf()[:8]:
            with torch.no_grad():
                logits = theirs(torch.tensor([sample.prompt + sample.response])).logits[0, len(sample.prompt) - 1 : -1]
            exact = logits.double().log_softmax(-1).gather(1, torch.tensor(sample.response)[:, None])[:, 0]
            error = max(error, expect_close("logprobs", torch.tensor(sample.logprobs), exact))
        return error

    error = check()
    functions = {
        "fastrlhf": fastrlhf,
        "generate, dynamic cache": lambda: generate(**SAMPLE),
        "generate, static cache": lambda: generate(cache_implementation="static", **SAMPLE),
    }
    timings = compare(functions, seconds=report.options.seconds, min_rounds=3)
    tokens = {name: sum(limits) / timing.median * 1e3 for name, timing in timings.items()}
    case = f"{NUM_PROMPTS} prompts, {sum(limits)} tokens"
    report.add(case, timings, tokens_per_s=tokens, logprob_error={"fastrlhf": error})
    several_samples(report, engine)
    report.finish()


def several_samples(report: Report, engine: Engine, num_samples: int = 4) -> None:
    """Samples of one prompt side by side, where it is read once, against the same samples in an order without
    neighbours, where each reads it."""
    num_prompts, prompt_length, num_new = NUM_PROMPTS // num_samples, 384, 32
    prompts = torch.randint(3, VOCAB, (num_prompts, prompt_length)).tolist()
    together, apart = (
        [*range(NUM_PROMPTS)],
        [n for k in range(num_samples) for n in range(k, NUM_PROMPTS, num_samples)],
    )

    def generate(order: list[int]) -> dict[int, list[int]]:
        samples = engine.generate([prompts[n // num_samples] for n in order], Sampling(num_new), seeds=order)
        return {n: sample.response for n, sample in zip(order, samples, strict=True)}

    same = sum(generate(together)[n] == response for n, response in generate(apart).items())
    print(f"{same} of {NUM_PROMPTS} samples are the same, token for token, in both orders")
    functions = {"read once": lambda: generate(together), "read for each sample": lambda: generate(apart)}
    case = f"{num_samples} samples of {num_prompts} prompts of {prompt_length} tokens, {num_new} new"
    report.add(case, compare(functions, seconds=report.options.seconds, min_rounds=3))


if __name__ == "__main__":
    main()
