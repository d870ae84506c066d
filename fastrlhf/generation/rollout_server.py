"""Generation on a running vLLM server, over its OpenAI-compatible completions endpoint (docs/rollout.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal

from fastrlhf.generation.sampling import Sample, Sampling, checked_limits
from fastrlhf.generation.server import Server, ServerError

FINISHED = {"stop": True, "length": False, "repetition": False}  # by the server's finish_reason


class ServerBackend:
    """A `RolloutBackend` that asks vLLM servers: prompts go out as token ids, tokens and log-probabilities come back.

    url: of the server, such as http://localhost:8000, or of several: prompts are divided, neighbours stay together
    model: one that they serve
    eos_token_ids: tokens that end a response; those that the server knows of its own are ignored
    update_weights: called before each rollout; it has to bring the policy's weights to the server
    logprobs_mode: what the server was started with (--logprobs-mode; raw_logprobs is its default)
    max_requests: requests under way at once
    timeout: seconds for one response
    api_key: sent as the bearer token"""

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
    ) -> None:
        urls = [url] if isinstance(url, str) else list(url)
        if not urls:
            raise ValueError("ServerBackend: give a url")
        if logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
            expected = "logprobs_mode must be raw_logprobs or processed_logprobs"
            raise ValueError(f"ServerBackend: {expected}, got {logprobs_mode!r}")
        if max_requests < 1:
            raise ValueError(f"ServerBackend: max_requests must be at least 1, got {max_requests}")
        self.servers = [Server("ServerBackend", url, model, timeout=timeout, api_key=api_key) for url in urls]
        self.model = model
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
        servers = [self.servers[n * len(self.servers) // len(requests)] for n in range(len(requests))]
        samples: dict[int, Sample] = {}
        pool = ThreadPoolExecutor(self.max_requests)
        try:
            posts = (
                pool.submit(server.post, "/v1/completions", request)
                for server, request in zip(servers, requests, strict=True)
            )
            numbers = {post: n for n, post in enumerate(posts)}
            for done in as_completed(numbers):
                n = numbers[done]
                which = f"{servers[n].url}, prompt {n}"
                samples[n] = self._sample(which, list(prompts[n]), done.result(), greedy=sampling.greedy)
                if progress is not None:
                    progress(len(samples[n].response))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [samples[n] for n in range(len(requests))]

    def _requests(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], limits: Sequence[int] | None
    ) -> list[dict[str, Any]]:
        budgets = checked_limits("ServerBackend", prompts, sampling, seeds, limits)
        if -1 in seeds:
            raise ValueError("ServerBackend: seeds must not be -1, which the server takes for none")
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
        return [{**common, "prompt": list(p), "seed": seed, "max_tokens": limit} for p, seed, limit in rows]

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

    def _sample(self, which: str, prompt: list[int], answer: Any, *, greedy: bool) -> Sample:
        """The sample in the answer to a prompt; which: server and number of the prompt, for errors."""

        def refuse(what: str) -> ServerError:
            return ServerError(f"ServerBackend: {which}: {what}")

        try:
            choice = answer["choices"][0]
            reason, tokens, read = choice["finish_reason"], choice.get("token_ids"), choice.get("prompt_token_ids")
            logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise refuse(f"the answer is not a completion: {str(answer)[:200]}") from None
        if not tokens:
            raise refuse("the answer has no token_ids; the server must know return_token_ids, as newer vLLMs do")
        if read is not None and list(read) != prompt:
            raise refuse(f"the server read {len(read)} other tokens than the {len(prompt)} of the prompt")
        if reason not in FINISHED:
            raise refuse(f"the response ended with finish_reason {reason!r}")
        if logprobs is None or len(logprobs) != len(tokens) or not all(map(_is_number, logprobs)):
            raise refuse(f"the answer does not have a log-probability for each of its {len(tokens)} tokens")
        sampler_logprobs = [0.0] * len(tokens) if greedy else list(logprobs)
        return Sample(prompt, list(tokens), list(logprobs), sampler_logprobs, FINISHED[reason])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
