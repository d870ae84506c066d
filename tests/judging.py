"""A judge that likes long responses: what a server answers for it."""

import math

from fastrlhf.commands.feedback.judges import TEST

RUBRIC = "{prompt}|{response_1}|{response_2}|{answer_1}{answer_2}"


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def opinion(question, bias=0.5):
    """A judge that likes long responses, and the first place: log-odds of the first one."""
    if question == TEST.format("A", "B"):  # which no rubric has written
        return bias
    _, first, second, _ = question.split("|")
    return len(first) - len(second) + bias


def top_logprobs(odds, mass=0.9):
    """The likeliest tokens of a judge with these log-odds for A, which says something else 1 - mass of the time."""
    first = sigmoid(odds)
    values = {"A": 0.75 * mass * first, " A": 0.25 * mass * first, "B": mass * (1 - first), "The": 1 - mass}
    return {token: math.log(value) for token, value in values.items()}


def chat(body):
    ((message),) = body["messages"]
    listed = [{"token": t, "logprob": v} for t, v in top_logprobs(opinion(message["content"])).items()]
    return {"choices": [{"logprobs": {"content": [{"token": "A", "top_logprobs": listed}]}}]}


def completion(body):
    return {"choices": [{"logprobs": {"top_logprobs": [top_logprobs(opinion(body["prompt"]))]}}]}
