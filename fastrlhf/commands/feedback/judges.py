"""Who is asked: a causal language model in this process, or one on an OpenAI-compatible server."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib.resources import files
from typing import Any

import torch

from fastrlhf.commands.feedback.judge import PLACEHOLDERS, Both, Judge, Question, Reply
from fastrlhf.commands.feedback.rows import read_text
from fastrlhf.data import Reason, Rejected
from fastrlhf.data.encoding import common_start
from fastrlhf.data.lengths import NO_LIMIT, check_characters
from fastrlhf.data.template import Renderer, load_tokenizer
from fastrlhf.errors import UserError
from fastrlhf.generation.server import ModelClient, ServerError, check_logprob, check_probabilities
from fastrlhf.models.heads import head_logprobs
from fastrlhf.models.policy import Policy
from fastrlhf.models.shared_prompts import can_share_prompts
from fastrlhf.packing import pack
from fastrlhf.runtime.concurrency import concurrently
from fastrlhf.runtime.http import read_key, shown
from fastrlhf.settings.feedback import JudgeConfig

TEST = "Answer with {} or {}."  # a question that no server refuses for its length or for what it says
OF_A_ROW = (400, 413, 422)  # statuses of a refusal that may be of one question, for its length or its content
LOOK_AT = {401: "judge_key_file", 403: "judge_key_file", 404: "judge and judge_model"}  # settings, by status
LOOK_AT |= dict.fromkeys(OF_A_ROW, "judge_template, judge_template_kwargs and judge_top")
UNSEEN = 0.01  # most that an answer which a server does not list may change P by


def make_judge(config: JudgeConfig) -> Judge:
    """Returns the judge that the settings name.

    Raises: FileNotFoundError, ValueError or ServerError for one that cannot be asked."""
    assert config.judge is not None
    if not config.is_server():
        options: dict[str, Any] = {"template": config.judge_template, "max_tokens": config.max_tokens}
        options |= {"template_kwargs": config.judge_template_kwargs, **config.model_options()}
        return LocalJudge(config.judge, config.answers, **options)
    assert config.judge_model is not None
    key = read_key(config.judge_key_file, "judge_key_file") if config.judge_key_file else None
    return ServerJudge(
        config.judge,
        config.judge_model,
        config.answers,
        chat=config.judge_template != "none",
        top=config.judge_top,
        template_kwargs=config.judge_template_kwargs,
        max_requests=config.judge_requests,
        timeout=config.judge_timeout,
        api_key=key,
    )


def make_question(config: JudgeConfig) -> Question:
    """Returns what writes the questions: the shipped one with the rubric in it, or that of the rubric's file, if it has
    placeholders of its own. Raises: ValueError for a file that is neither."""
    shipped = files("fastrlhf.commands.feedback")
    text = (shipped / "question.txt").read_text(encoding="utf-8")
    if config.rubric is None:
        return Question(text, (shipped / "rubric.txt").read_text(encoding="utf-8"), config.answers)
    rubric = read_text(config.rubric, "rubric")
    whole = any(f"{{{name}}}" in rubric for name in PLACEHOLDERS)
    return Question(rubric, "", config.answers) if whole else Question(text, rubric, config.answers)


class LocalJudge:
    """A causal language model that is asked in this process, in packed forward passes.

    path: its folder or hub id; answers: the two texts that count as answers
    template, template_kwargs: see `Renderer`; max_tokens: tokens a forward pass
    options: those of `Policy.from_pretrained`

    Raises: ValueError for an answer for which the vocabulary has no token."""

    def __init__(
        self,
        path: str,
        answers: Sequence[str],
        *,
        template: str = "auto",
        template_kwargs: Mapping[str, Any] | None = None,
        max_tokens: int,
        **options: Any,
    ) -> None:
        tokenizer = load_tokenizer(path)
        self.renderer, self.max_tokens = Renderer(tokenizer, template, template_kwargs), max_tokens
        self.tokens = [tokens_of(tokenizer, answer) for answer in answers]
        self.policy = Policy.from_pretrained(path, freeze=True, **options)
        self.device = self.policy.model.device
        self.shares_starts = can_share_prompts(self.policy, self.device)
        self.context = getattr(self.policy.model.config.get_text_config(), "max_position_embeddings", None)

    def ask(self, questions: Sequence[tuple[str, str]], progress: Callable[[int], object]) -> list[Both | Rejected]:
        """See `Judge`. A question that leaves no room for a token in the model's context is rejected."""
        tokens = [self._tokens(both) for both in questions]
        fits = [both for both in tokens if not isinstance(both, Rejected)]
        progress(len(tokens) - len(fits))
        replies = iter(self.replies([row for both in fits for row in both], progress))
        return [both if isinstance(both, Rejected) else (next(replies), next(replies)) for both in tokens]

    def _tokens(self, questions: tuple[str, str]) -> list[list[int]] | Rejected:
        """Those of the two questions about a pair, if the judge can read both."""
        try:
            for question in questions:
                check_characters(question, self.renderer.tokenizer, self.context or NO_LIMIT)
            tokens = list(map(self.renderer.prompt, questions))
        except Rejected as rejected:
            return rejected
        longest = max(map(len, tokens))
        if self.context is not None and longest >= self.context:
            return Rejected(Reason.TOO_LONG, f"{longest} tokens, the judge reads {self.context}")
        return tokens

    @torch.no_grad()
    def replies(self, prompts: Sequence[list[int]], progress: Callable[[int], object]) -> list[Reply]:
        """The replies to 2P prompts. The log-probability of an answer, in float64, is summed over its tokens.

        The second prompt of a pair is read from where it parts from the first, where that can be."""
        prefixes = [
            common_start(prompts[n - 1], row[:-1]) if n % 2 and self.shares_starts else 0
            for n, row in enumerate(prompts)
        ]
        rows = [row[start:] for row, start in zip(prompts, prefixes, strict=True)]
        batch = pack(rows, prefix_lengths=prefixes, device=self.device)
        forms = torch.tensor([token for tokens in self.tokens for token in tokens], device=self.device)
        head, found = self.policy.model.get_output_embeddings(), []
        for part in batch.microbatches(self.max_tokens, together=2) if prompts else ():
            hidden = self.policy.hidden(part, part.last_rows)
            num = len(hidden)
            values = head_logprobs(self.policy.model, hidden.repeat_interleave(len(forms), 0), forms.repeat(num))
            both = values.view(num, -1).double().split([len(tokens) for tokens in self.tokens], 1)
            answers = torch.stack([each.logsumexp(1) for each in both], 1).tolist()
            others = head(hidden.to(head.weight.dtype)).index_fill(1, forms, -math.inf).argmax(1).tolist()
            texts = self.renderer.tokenizer.batch_decode([[token] for token in others])
            found += [Reply(first, second, text) for (first, second), text in zip(answers, texts, strict=True)]
            progress(num // 2)
        return found


class ServerJudge:
    """A model on an OpenAI-compatible server, asked for one token and the likeliest ones in its place.

    url, model, timeout: see `ModelClient`; api_key: sent as the bearer token
    answers: the two texts that count as answers
    chat: whether the question is a user's message (/v1/chat/completions) or plain text (/v1/completions)
    template_kwargs: what the server's chat template gets besides
    top: how many of the likeliest tokens the server is to list; max_requests: requests under way at once

    Raises: ServerError for a server that is not there, does not serve the model, or refuses a question of a few words:
    then it is not the question that is wrong, but how it is asked."""

    def __init__(
        self,
        url: str,
        model: str,
        answers: Sequence[str],
        *,
        chat: bool = True,
        top: int = 20,
        template_kwargs: Mapping[str, Any] | None = None,
        max_requests: int = 16,
        timeout: float = 600.0,
        api_key: str | None = None,
    ) -> None:
        self.server = ModelClient("judge", url, model, timeout=timeout, timeout_option="judge_timeout", key=api_key)
        self.answers, self.chat, self.top, self.max_requests = answers, chat, top, max_requests
        self.template_kwargs = dict(template_kwargs or {})
        self.path = "/v1/chat/completions" if chat else "/v1/completions"
        self.server.check_model()
        self.check()

    def check(self) -> None:
        """Asks a question of a few words. Raises: ServerError when it is refused, or its answer cannot be used."""
        try:
            self._answer(TEST.format(*self.answers))
        except ServerError as error:
            if error.status not in LOOK_AT:
                raise
            text = f"even a question of a few words is refused: look at {LOOK_AT[error.status]}"
            raise ServerError(f"{error}; {text}", error.status) from error

    def ask(self, questions: Sequence[tuple[str, str]], progress: Callable[[int], object]) -> list[Both | Rejected]:
        """See `Judge`. A pair about which the server refuses a question, but not one of a few words, is rejected.

        Raises: ServerError for every other failure."""
        replies: dict[int, Reply | Rejected] = {}
        flat = [question for both in questions for question in both]
        with closing(concurrently(self._reply, flat, self.max_requests)) as done:
            for n, _, reply in done:
                replies[n] = reply
                progress(int(n ^ 1 in replies))  # the other one about the pair
        pairs = [(replies[n], replies[n + 1]) for n in range(0, len(flat), 2)]
        return [next((r for r in pair if isinstance(r, Rejected)), pair) for pair in pairs]  # type: ignore[misc]

    def _reply(self, question: str) -> Reply | Rejected:
        try:
            return self._answer(question)
        except ServerError as error:
            if error.status not in OF_A_ROW:
                raise
            self.check()
            return Rejected(Reason.REFUSED, str(error))

    def _answer(self, question: str) -> Reply | Rejected:
        # raw or tempered, log-probabilities are the same at temperature 1
        request: dict[str, Any] = {"model": self.server.model, "max_tokens": 1, "temperature": 1.0}
        if self.chat:
            request |= {"messages": [{"role": "user", "content": question}], "logprobs": True, "top_logprobs": self.top}
            if self.template_kwargs:  # as vLLM and SGLang call them
                request["chat_template_kwargs"] = self.template_kwargs
        else:
            request |= {"prompt": question, "logprobs": self.top}
        answer = self.server.post(self.path, request)
        try:
            listed = self._listed(answer["choices"][0]["logprobs"])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            text = f"told no top log-probabilities of a token ({shown(str(error), 80)}): {shown(str(answer))}"
            raise self.server.error(self.path, text) from error
        return reply_of(listed, self.answers)

    def _listed(self, logprobs: Any) -> list[tuple[str, float]]:
        """The likeliest tokens in an answer. Raises: what Python does for one without them; ValueError."""
        if self.chat:
            listed = [(each["token"], each["logprob"]) for each in logprobs["content"][0]["top_logprobs"]]
        else:
            listed = list(logprobs["top_logprobs"][0].items())
        if not listed or not all(isinstance(token, str) for token, _ in listed):
            raise UserError("no texts of tokens")
        found = [(token, check_logprob(value)) for token, value in listed]
        check_probabilities(math.fsum(math.exp(value) for _, value in found))
        return found


def reply_of(listed: Sequence[tuple[str, float]], answers: Sequence[str]) -> Reply | Rejected:
    """Returns the reply in the likeliest tokens (text, log-probability) that a server listed.

    An answer that is not among them is no likelier than the last of them. Where that could change P by more than 0.01
    the reply is rejected, otherwise its probability counts as 0."""
    found = [[value for token, value in listed if token.strip() == answer] for answer in answers]
    sums = [math.fsum(map(math.exp, values)) for values in found]
    bound = math.exp(min(value for _, value in listed))
    others = [(math.exp(value), token) for token, value in listed if token.strip() not in answers]
    likelihood, other = max(others, default=(0.0, ""))
    if not any(sums):
        return Reply(-math.inf, -math.inf, other)
    if not all(sums) and bound / (bound + max(sums)) > UNSEEN:
        detail = (
            f"{answers[sums.index(0.0)]!r} is not among the {len(listed)} likeliest tokens, and may have {bound:.3g}"
        )
        instead = f"; its likeliest token is {other!r}" if likelihood > max(sums) else ""
        return Rejected(Reason.UNSEEN, f"{detail} where the other has {max(sums):.3g}{instead}")
    first, second = (math.log(value) if value else -math.inf for value in sums)
    return Reply(first, second, other)


def tokens_of(tokenizer: Any, answer: str) -> list[int]:
    """Returns every token of the vocabulary that is the answer but for white space around it."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    tokens = [token for token, text in enumerate(texts) if text.strip() == answer]
    if not tokens:
        raise UserError(f"answers: the judge's vocabulary has no token {answer!r}; give other answers")
    return tokens
