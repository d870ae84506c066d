"""Generation: our engine against transformers' `generate` with its dynamic and static caches, for equal work.

A random Llama of 10.6 million parameters (on a GPU larger ones, in bfloat16), 64 prompts of 32 to 128 tokens, responses
of 8 to 128 tokens (log-normal, so that most rows of a padded batch finish early). Every response is made to end at its
target length on both sides.
"""

import copy

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks import llama
from benchmarks.case import expect_close
from benchmarks.harness import Report, compare
from fastrlhf.attention import ATTENTION
from fastrlhf.rollout import Engine, Sampling

MAX_NEW = 128
SIZES = {  # of the model, and prompts
    "cpu": [(*llama.SMALL, 64)],
    "cuda": [(*llama.SMOLLM2_135M, 64), (*llama.QWEN2_1_5B, 64)],
    "tiny": [(*llama.TINY, 2)],
}
SAMPLE = {"do_sample": True, "top_k": 0, "top_p": 1.0}


class EndAt(LogitsProcessor):
    """Forbids EOS before each row's target length and forces it there."""

    def __init__(self, prompt_width: int, targets: torch.Tensor) -> None:
        self.prompt_width, self.targets = prompt_width, targets

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = self.targets <= input_ids.shape[1] - self.prompt_width + 1
        scores[:, llama.EOS] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, llama.EOS] = 0.0
        return scores


def left_padded(prompts: list[list[int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def measure(report: Report, shape: tuple[int, ...], num_prompts: int) -> None:
    device, vocab = report.options.device, shape[-1]
    dtype, near = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 0.1)
    theirs = llama.make(shape, device, dtype).eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation(ATTENTION)
    prompts = [torch.randint(3, vocab, (int(n),)).tolist() for n in torch.randint(32, 129, (num_prompts,))]
    limits = (
        (torch.randn(num_prompts) * 0.6 + 4.0).exp().clamp(8, 9 if report.options.tiny else MAX_NEW).long().tolist()
    )
    (ids, mask), targets = left_padded(prompts, device), torch.tensor(limits, device=device)
    engine = Engine(ours, eos_token_ids=(), max_slots=num_prompts)
    seeds = range(num_prompts)

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
            tokens = torch.tensor([sample.prompt + sample.response], device=device)
            with torch.no_grad():
                logits = theirs(tokens).logits[0, len(sample.prompt) - 1 : -1]
            exact = logits.double().log_softmax(-1).gather(1, tokens[0, len(sample.prompt) :, None])[:, 0].cpu()
            error = max(error, expect_close("logprobs", torch.tensor(sample.logprobs), exact, rtol=near, atol=near))
        return error

    error = check()
    functions = {
        "fastrlhf": fastrlhf,
        "generate, dynamic cache": lambda: generate(**SAMPLE),
        "generate, static cache": lambda: generate(cache_implementation="static", **SAMPLE),
    }
    case = f"{num_prompts} prompts, {sum(limits)} tokens" + f", {shape[0]} wide" * (device == "cuda")
    # on a GPU transformers compiles for its static cache, which may take longer than there is time
    for left_out in ["static", "dynamic"] if device == "cuda" else ["none"]:
        some = {name: function for name, function in functions.items() if left_out not in name}
        timings = compare(some, seconds=report.options.seconds, min_rounds=3)
        tokens = {name: sum(limits) / timing.median * 1e3 for name, timing in timings.items()}
        title = case + ", compiled" * (left_out == "dynamic")
        report.add(title, timings, tokens_per_s=tokens, logprob_error={"fastrlhf": error})


def main() -> None:
    report = Report("generation", SIZES)
    torch.set_default_device(None)  # what is not of the model is made on the CPU, as in training
    for *shape, num_prompts in report.sizes:
        measure(report, tuple(shape), num_prompts)
    report.finish()


if __name__ == "__main__":
    main()
