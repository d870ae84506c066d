"""Generation: our engine against transformers' `generate` with its dynamic and static caches, for equal work; on the
CPU also against its continuous batching, `generate_batch`.

A random Llama of 10.6 million parameters (on a GPU larger ones, in bfloat16), 64 prompts of 32 to 128 tokens, responses
of 8 to 128 tokens (log-normal, so that most rows of a padded batch finish early). Every response is made to end at its
target length on both sides. memory_limit_ms: the time to read the weights once a step and the keys and values of each
row, at the rate of a copy; product_limit_ms: the time of the matrix products of all tokens, at the rate of a large one.
tokens_per_s counts tokens of responses up to their target lengths, on both sides: what a padded batch draws beyond is
of no use.

Then several samples of each prompt: side by side, where it is read once, and apart, where it is read for each.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks import llama
from benchmarks.case import expect_close
from benchmarks.harness import Prepared, Report, compare
from fastrlhf.generation.engine import Engine, Sample, Sampling
from fastrlhf.models.loading import load_causal_lm

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


@contextmanager
def continuous_batching(
    model: PreTrainedModel, prompts: list[list[int]], limits: list[int]
) -> Iterator[Callable[[], list[list[int]]]]:
    """Makes a function that does what `generate_batch` does, with a limit for each prompt."""
    context = copy.deepcopy(model).continuous_batching_context_manager(
        generation_config=GenerationConfig(max_new_tokens=MAX_NEW, eos_token_id=-1, pad_token_id=0, **SAMPLE),
        continuous_batching_config=ContinuousBatchingConfig(page_size=32, num_blocks=1024, max_batch_tokens=1024),
        warmup=False,
    )

    def generate() -> list[list[int]]:
        numbers = [manager.add_request(p, max_new_tokens=n) for p, n in zip(prompts, limits, strict=True)]
        responses: dict[str, list[int]] = {}
        while len(responses) < len(numbers):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("continuous batching stopped before its end")
            if result is not None and result.is_finished():
                responses[result.request_id] = result.generated_tokens
        if [len(responses[number]) for number in numbers] != limits:
            raise AssertionError("continuous batching gave responses of other lengths")
        return [responses[number] for number in numbers]

    with context as manager:
        yield generate


def in_its_turns(make: Callable[[], AbstractContextManager[Callable[[], Any]]]) -> Prepared:
    """A function that exists in its own turns only, as the thread of continuous batching, which slows all others."""

    def prepare() -> tuple[ExitStack, Callable[[], Any]]:
        opened = ExitStack()
        return opened, opened.enter_context(make())

    return Prepared(prepare, lambda opened, function: function(), finish=lambda opened, function: opened.close())


def limits_ms(report: Report, engine: Engine, prompts: list[list[int]], limits: list[int]) -> dict[str, float]:
    """The least time in ms that memory, and that matrix products allow, with all rows decoded together."""
    weights = {p for name, p in engine.model.named_parameters() if p.ndim > 1 and "embed" not in name}
    weights.add(engine.model.get_output_embeddings().weight)  # also the embeddings, where they are one
    seen = sum(sum(range(len(p), len(p) + n)) for p, n in zip(prompts, limits, strict=True))
    num_bytes = max(limits) * sum(w.nbytes for w in weights) + seen * engine.bytes_per_token()
    products = 2 * sum(w.numel() for w in weights) * (sum(map(len, prompts)) + sum(limits))
    rate = "matrix_gflop_s" if engine.model.dtype == torch.float32 else "matrix_bf16_gflop_s"
    return {
        "memory_limit_ms": num_bytes / report.machine["copy_gb_s"] / 1e6,
        "product_limit_ms": products / report.machine[rate] / 1e6,
    }


def several_samples(report: Report, engine: Engine, vocab: int, num_samples: int = 4) -> None:
    """Samples of each prompt in two orders: neighbours share one reading of their prompt, others do not."""
    tiny = report.options.tiny
    num_prompts, length, num_new = (2, 12, 2) if tiny else (8, 256, 16)
    prompts, num_rows = torch.randint(3, vocab, (num_prompts, length)).tolist(), num_prompts * num_samples
    together, apart = [*range(num_rows)], [n for k in range(num_samples) for n in range(k, num_rows, num_samples)]

    def generate(order: list[int]) -> dict[int, list[int]]:
        samples = engine.generate([prompts[n // num_samples] for n in order], Sampling(num_new), seeds=order)
        return {n: sample.response for n, sample in zip(order, samples, strict=True)}

    same = sum(generate(together)[n] == response for n, response in generate(apart).items())
    print(f"{same} of {num_rows} samples are the same, token for token, in both orders")
    functions = {"read once": lambda: generate(together), "read for each sample": lambda: generate(apart)}
    case = f"{num_samples} samples of {num_prompts} prompts of {length} tokens, {num_new} new"
    report.add(case, compare(functions, seconds=report.options.seconds, min_rounds=3))


def logprob_error(model: PreTrainedModel, samples: list[Sample], near: float) -> float:
    """The largest error of their log-probabilities, against the model run on the finished text."""
    error = 0.0
    for sample in samples:
        tokens = torch.tensor([sample.prompt + sample.response], device=model.device)
        with torch.no_grad():
            logits = model(tokens).logits[0, len(sample.prompt) - 1 : -1]
        exact = logits.double().log_softmax(-1).gather(1, tokens[0, len(sample.prompt) :, None])[:, 0].cpu()
        error = max(error, expect_close("logprobs", torch.tensor(sample.logprobs), exact, rtol=near, atol=near))
    return error


def measure(report: Report, shape: tuple[int, ...], num_prompts: int) -> None:
    device, vocab = report.options.device, shape[-1]
    dtype, near = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 0.1)
    theirs = llama.make(shape, device, dtype).eval()
    ours = load_causal_lm(copy.deepcopy(theirs), dtype=dtype, device=device)
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

    def check() -> None:
        greedy = engine.generate(prompts, Sampling(MAX_NEW, greedy=True), seeds=seeds, limits=limits)
        expected = generate(do_sample=False)[:, ids.shape[1] :]
        same = [s.response[:-1] == row[: n - 1].tolist() for s, row, n in zip(greedy, expected, limits, strict=True)]
        print(f"greedy: {sum(same)} of {len(same)} responses are those of generate, token for token")

    check()
    error = logprob_error(theirs, fastrlhf()[:8], near)
    functions: dict[str, Any] = {
        "fastrlhf": fastrlhf,
        "generate, dynamic cache": lambda: generate(**SAMPLE),
        "generate, static cache": lambda: generate(cache_implementation="static", **SAMPLE),
    }
    case = f"{num_prompts} prompts, {sum(limits)} tokens" + f", {shape[0]} wide" * (device == "cuda")
    bounds = {name: {"fastrlhf": ms} for name, ms in limits_ms(report, engine, prompts, limits).items()}
    # on a GPU transformers compiles for its static cache, which may take longer than there is time
    for left_out in ["static", "dynamic"] if device == "cuda" else ["none"]:
        some = {name: function for name, function in functions.items() if left_out not in name}
        timings = compare(some, seconds=report.options.seconds, min_rounds=3)
        tokens = {name: sum(limits) / timing.median * 1e3 for name, timing in timings.items()}
        title = case + ", compiled" * (left_out == "dynamic")
        report.add(title, timings, tokens_per_s=tokens, logprob_error={"fastrlhf": error}, **bounds)
    if device == "cpu":  # by itself: what its threads leave behind slows the others
        theirs_batched = in_its_turns(lambda: continuous_batching(theirs, prompts, limits))
        pair = {"fastrlhf": fastrlhf, "generate_batch": theirs_batched}
        report.add(f"{case}, continuous batching", compare(pair, seconds=report.options.seconds, min_rounds=3))
    several_samples(report, engine, vocab)


def main() -> None:
    report = Report("generation", SIZES)
    torch.set_default_device(None)  # what is not of the model is made on the CPU, as in training
    for *shape, num_prompts in report.sizes:
        measure(report, tuple(shape), num_prompts)
    report.finish()


if __name__ == "__main__":
    main()
