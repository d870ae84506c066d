"""Generation on running vLLM servers, through their OpenAI-compatible completions endpoint (docs/rollout.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from typing import Any, Literal

from fastrlhf.errors import UserError
from fastrlhf.generation.completions import read_sample
from fastrlhf.generation.sampling import Sample, Sampling, checked_limits
from fastrlhf.generation.server import ModelClient, check_logprob
from fastrlhf.runtime.concurrency import concurrently
from fastrlhf.runtime.http import shown

TEMPERATURES = (0.01, 2.0)  # vLLM takes a smaller one for 0.01, and refuses a larger one
PROBED = 5  # likeliest tokens, by whose log-probabilities the server's --logprobs-mode is found out


class ServerBackend:
    """A `RolloutBackend` that asks vLLM servers: prompts go out as token ids, tokens and log-probabilities come back.

    url: such as http://localhost:8000, or several, among which prompts are divided, neighbours together
    model: one that they serve
    eos_token_ids: tokens that end a response, in place of the server's own
    update_weights: called before each rollout; it must bring the policy's weights to the servers
    logprobs_mode: the --logprobs-mode of the servers; vLLM's default is raw_logprobs
    max_requests: most requests at a time
    timeout: seconds for one response, retries included (see `Server`)
    api_key: sent as the bearer token
    vocab_size: of the policy; an answer with a larger token id is refused"""

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
            raise UserError("ServerBackend: give a url")
        if logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
            expected = "logprobs_mode must be raw_logprobs or processed_logprobs"
            raise UserError(f"ServerBackend: {expected}, got {logprobs_mode!r}")
        if max_requests < 1:
            raise UserError(f"ServerBackend: max_requests must be at least 1, got {max_requests}")
        limit: dict[str, Any] = {"timeout": timeout, "timeout_option": "rollout_timeout"}
        self.servers = [ModelClient("ServerBackend", url, model, key=api_key, **limit) for url in urls]
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
        if self.update_weights is not None:  # also without a prompt: under torchrun all processes take part in it
            self.update_weights()
        if not requests:
            return []
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
        """Checks before a run that the servers can do what the run will ask of them.

        Raises: ValueError if the longest prompt and max_new_tokens exceed the server's max_model_len, and if its
        log-probabilities ignore the temperature; ServerError as `generate`."""
        longest = max(map(len, prompts))
        for server in self.servers:
            if self.update_weights is None or not server.models():  # update_weights may be what loads the model
                server.check_model()
            limit, needed = server.max_model_len(), longest + sampling.max_new_tokens
            if limit is not None and needed > limit:
                sizes = f"{longest} tokens of the longest prompt and max_new_tokens={sampling.max_new_tokens}"
                advice = f"start it with --max-model-len {needed}, or lower max_prompt_tokens or max_new_tokens"
                raise UserError(
                    f"ServerBackend: {server.url} reads {limit} tokens (max_model_len), less than {sizes}; {advice}"
                )
            if sampling.temperature != 1 and not self._tempers(server, list(prompts[0][:64])):
                text = f"tells log-probabilities of temperature 1, not {sampling.temperature}"
                advice = "start it with --logprobs-mode processed_logprobs"
                raise UserError(f"ServerBackend: {server.url} {text}; {advice}")

    def _tempers(self, server: ModelClient, prompt: list[int]) -> bool:
        """Whether the server divides by the temperature: then log-probabilities lie half as far apart at 2 as at 1."""
        served = list(server.models())
        model = self.model if self.model in served else served[0]
        first, second = (self._likeliest(server, model, prompt, temperature) for temperature in (1.0, 2.0))
        both = first.keys() & second.keys()
        apart = [max(told[t] for t in both) - min(told[t] for t in both) for told in (first, second)] if both else [0.0]
        return apart[0] < 0.05 or apart[1] < 0.75 * apart[0]  # all equally likely: nothing can be told

    def _likeliest(self, server: ModelClient, model: str, prompt: list[int], temperature: float) -> dict[str, float]:
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

    def _ask(self, asked: tuple[int, ModelClient, dict[str, Any]]) -> Sample:
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
            raise UserError(f"ServerBackend: {expected}, got {sampling.temperature}")
        if sampling.top_k or sampling.top_p < 1 or sampling.min_p or sampling.min_new_tokens:
            text = "the server tells log-probabilities before or after top_k, top_p, min_p and min_new_tokens, not both"
            raise UserError(f"ServerBackend: {text}; leave them at their defaults, got {sampling}")
        tempered = sampling.temperature != 1
        if tempered and (sampling.greedy or self.logprobs_mode == "raw_logprobs"):
            advice = "start it with --logprobs-mode processed_logprobs and say so in logprobs_mode"
            text = f"the server's log-probabilities are those of temperature 1, not {sampling.temperature}"
            raise UserError(f"ServerBackend: {text}" + ("" if sampling.greedy else f"; {advice}"))
        common = self._common(sampling)
        rows = zip(prompts, seeds, budgets, strict=True)
        return [{**common, "prompt": list(p), "seed": server_seed(s), "max_tokens": limit} for p, s, limit in rows]

    def _common(self, sampling: Sampling) -> dict[str, Any]:
        """Returns the fields of every request, with all that a server would else take from the model's files."""
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
