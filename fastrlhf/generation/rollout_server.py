"""Generation on a running vLLM server, over its OpenAI-compatible completions endpoint (docs/rollout.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from typing import Any, Literal

from fastrlhf.generation.completions import read_sample
from fastrlhf.generation.sampling import Sample, Sampling, checked_limits
from fastrlhf.generation.server import ModelServer, check_logprob
from fastrlhf.runs.http import shown
from fastrlhf.runs.parallel import concurrently

TEMPERATURES = (0.01, 2.0)  # vLLM takes a smaller one for 0.01, and refuses a larger one
PROBED = 5  # likeliest tokens whose log-probabilities tell the server's --logprobs-mode


class ServerBackend:
    """A `RolloutBackend` that asks vLLM servers: prompts go out as token ids, tokens and log-probabilities come back.

    url: of the server, such as http://localhost:8000, or of several: prompts are divided, neighbours stay together
    model: one that they serve
    eos_token_ids: tokens that end a response; those that the server knows of its own are ignored
    update_weights: called before each rollout; it has to bring the policy's weights to the server
    logprobs_mode: what the server was started with (--logprobs-mode; raw_logprobs is its default)
    max_requests: requests under way at once
    timeout: seconds for one response: its deadline, with all tries of the request (see `Server`)
    api_key: sent as the bearer token
    vocab_size: tokens that the policy knows; others in an answer are refused"""

    def __init__(
        self,
        url: str | Sequence[str],
        model: str,
        *,
        eos_token_ids: Collection[int],
        update_weights: Callable[[], object] | None = None,
        logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs",
        max_requests: int = 64,
        timeout: float = 600.0,
        api_key: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        urls = [url] if isinstance(url, str) else list(url)
        if not urls:
            raise ValueError("ServerBackend: give a url")
        if logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
            expected = "logprobs_mode must be raw_logprobs or processed_logprobs"
            raise ValueError(f"ServerBackend: {expected}, got {logprobs_mode!r}")
        if max_requests < 1:
            raise ValueError(f"ServerBackend: max_requests must be at least 1, got {max_requests}")
        self.servers = [ModelServer("ServerBackend", url, model, timeout=timeout, key=api_key) for url in urls]
        self.model, self.vocab_size = model, vocab_size
        self.eos_token_ids = sorted(eos_token_ids)
        self.update_weights, self.logprobs_mode, self.max_requests = update_weights, logprobs_mode, max_requests

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> list[Sample]:
        """Returns a sample for each prompt, in their order; the arguments are those of `Engine.stream`.

        progress is called for each response with the number of its tokens. Seeds make a rollout repeatable as far as
        the server does; its draws are not those of `Engine`.
        Raises: ValueError for bad prompts, seeds or limits, and for sampling of which the server tells only one of the
        two log-probabilities; ServerError for a server that is not there, is too slow, does not serve the model,
        or returns something else than was asked for."""
        requests = self._requests(prompts, sampling, seeds, limits)
        if not requests:
            return []
        if self.update_weights is not None:
            self.update_weights()
        for server in self.servers:
            server.check_model()
        samples: dict[int, Sample] = {}
        numbered = [(n, self.servers[n * len(self.servers) // len(requests)], r) for n, r in enumerate(requests)]
        with closing(concurrently(self._ask, numbered, self.max_requests)) as done:
            for n, _, sample in done:
                samples[n] = sample
                if progress is not None:
                    progress(len(sample.response))
        return [samples[n] for n in range(len(requests))]

    def check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Asks the servers whether they can do what a run will ask of them, before it begins.

        Raises: ValueError for prompts that are too long beside max_new_tokens, and for log-probabilities that are not
        those of the temperature; ServerError as `generate`."""
        longest = max(map(len, prompts))
        for server in self.servers:
            if self.update_weights is None:  # which may be what loads the model
                server.check_model()
            limit, needed = server.max_model_len(), longest + sampling.max_new_tokens
            if limit is not None and needed > limit:
                sizes = f"{longest} tokens of the longest prompt and max_new_tokens={sampling.max_new_tokens}"
                advice = f"start it with --max-model-len {needed}, or lower max_prompt_tokens or max_new_tokens"
                raise ValueError(
                    f"ServerBackend: {server.url} reads {limit} tokens (max_model_len), less than {sizes}; {advice}"
                )
            if sampling.temperature != 1 and not self._tempers(server, list(prompts[0][:64])):
                text = f"tells log-probabilities of temperature 1, not {sampling.temperature}"
                advice = "start it with --logprobs-mode processed_logprobs"
                raise ValueError(f"ServerBackend: {server.url} {text}; {advice}")

    def _tempers(self, server: ModelServer, prompt: list[int]) -> bool:
        """Whether log-probabilities are those of the temperature: at 2 they lie half as far apart as at 1."""
        served = list(server.models())
        model = self.model if self.model in served else served[0]
        first, second = (self._likeliest(server, model, prompt, temperature) for temperature in (1.0, 2.0))
        both = first.keys() & second.keys()
        apart = [max(told[t] for t in both) - min(told[t] for t in both) for told in (first, second)] if both else [0.0]
        return apart[0] < 0.05 or apart[1] < 0.75 * apart[0]  # all equally likely: nothing can be told

    def _likeliest(self, server: ModelServer, model: str, prompt: list[int], temperature: float) -> dict[str, float]:
        """The log-probabilities of the likeliest first tokens of a response."""
        fields = {**self._common(Sampling(1, temperature=temperature)), "model": model, "prompt": prompt, "seed": 0}
        fields |= {"max_tokens": 1, "logprobs": PROBED, "return_tokens_as_token_ids": True}
        answer = server.post("/v1/completions", fields)
        try:
            (told,) = answer["choices"][0]["logprobs"]["top_logprobs"]
            return {str(token): check_logprob(value) for token, value in told.items()}
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            text = f"told no log-probabilities of the {PROBED} likeliest tokens ({shown(str(error), 80)})"
            raise server.error("/v1/completions", f"{text}: {shown(str(answer))}") from error

    def _ask(self, asked: tuple[int, ModelServer, dict[str, Any]]) -> Sample:
        n, server, request = asked
        answer = server.post("/v1/completions", request)
        try:
            return read_sample(request, answer, self.vocab_size)
        except ValueError as error:
            raise server.error("", f"prompt {n}: {error}") from None

    def _requests(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], limits: Sequence[int] | None
    ) -> list[dict[str, Any]]:
        budgets = checked_limits("ServerBackend", prompts, sampling, seeds, limits)
        low, high = TEMPERATURES
        if not sampling.greedy and not low <= sampling.temperature <= high:
            expected = f"servers take a temperature from {low} to {high}"
            raise ValueError(f"ServerBackend: {expected}, got {sampling.temperature}")
        if sampling.top_k or sampling.top_p < 1 or sampling.min_p or sampling.min_new_tokens:
            text = "the server tells log-probabilities before or after top_k, top_p, min_p and min_new_tokens, not both"
            raise ValueError(f"ServerBackend: {text}; leave them at their defaults, got {sampling}")
        tempered = sampling.temperature != 1
        if tempered and (sampling.greedy or self.logprobs_mode == "raw_logprobs"):
            advice = "start it with --logprobs-mode processed_logprobs and say so in logprobs_mode"
            text = f"the server's log-probabilities are those of temperature 1, not {sampling.temperature}"
            raise ValueError(f"ServerBackend: {text}" + ("" if sampling.greedy else f"; {advice}"))
        common = self._common(sampling)
        rows = zip(prompts, seeds, budgets, strict=True)
        return [{**common, "prompt": list(p), "seed": server_seed(s), "max_tokens": limit} for p, s, limit in rows]

    def _common(self, sampling: Sampling) -> dict[str, Any]:
        """Fields of every request. Whatever the server might fill in from the model's files is said."""
        fields: dict[str, Any] = {
            "model": self.model,
            "temperature": 0.0 if sampling.greedy else sampling.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,
            "stop_token_ids": self.eos_token_ids,
            "stop": list(sampling.stop),
            "logprobs": 0,
            "return_token_ids": True,
        }
        if sampling.repeat_ngram:
            sizes = {"min_pattern_size": 1, "max_pattern_size": sampling.repeat_ngram}
            fields["repetition_detection"] = {**sizes, "min_count": sampling.repeat_times}
        return fields


def server_seed(seed: int) -> int:
    """Returns a seed of 32 bits for one of 64, in which run, step and number of the sample are told apart.

    Servers on a CPU read the low 32 bits, which would be the same for each run. A hash spreads all 64 over them: of n
    samples to one prompt two are equal by chance with a probability of about n^2 / 2^33 (5e-7 for 64 samples)."""
    return int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "little", signed=True), digest_size=4).digest(), "little")
