"""A PPO step on given responses: what PPO makes of them, and the same in float64 from the papers' formulas.

PPO is used as any caller would: settings, a rollout backend, metrics, weights. The first of the step's two updates is
large, so that the second has ratios away from 1, clipped tokens and clipped values.
"""

import math
import tempfile
from pathlib import Path

import torch
from loops import model_folder, write_rows
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastrlhf import PPO, PPOConfig
from fastrlhf.generation.engine import Sample
from fastrlhf.models.policy import RewardModel

LEARNED = ("model", "reward")  # what the policy and the value model start as
RATES = {"model": 0.5, "reward": 0.1}  # of an update: so large that the next one clips some tokens and values
EPS = 1e7


def make_models(folder):
    """Random models: a policy, a reference near it, and a reward model."""
    torch.manual_seed(0)
    for name in ("model", "reference"):
        model_folder(folder / name)
    RewardModel.from_pretrained(model_folder(folder / "reward"), new_head=True).save_pretrained(folder / "reward")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained(folder / "reference")
    return folder


def responses_of(lengths, eos, *, width=4, seed=1):
    """(prompt, response) of random tokens; a response of a length in `eos` ends with it."""
    tokenizer, generator = tiny_tokenizer(), torch.Generator().manual_seed(seed)
    rows = []
    for n, length in enumerate(lengths):
        response = torch.randint(20, 250, (length,), generator=generator).tolist()
        response[-1] = tokenizer.eos_token_id if length in eos else response[-1]
        rows.append(([*range(60, 59 + width), 40 + n], response))
    return rows


class GivenResponses:
    """A rollout backend whose responses are given, with the log-probabilities that transformers computes for them."""

    def __init__(self, folder, rows, temperature):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
        with torch.no_grad():
            logprobs, _ = response_logprobs(model, rows, temperature)
        end = tiny_tokenizer().eos_token_id
        self.samples = [
            Sample(prompt, response, row.tolist(), row.tolist(), response[-1] == end)
            for (prompt, response), row in zip(rows, logprobs, strict=True)
        ]

    def generate(self, prompts, sampling, *, seeds, limits=None, progress=None):
        return self.samples


def our_run(folder, rows, **changes):
    """A PPO run of a step on these responses, in a folder of its own, with steps that are learning rates times means
    of gradients: AdamW with an epsilon that its second moment does not count beside."""
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": "unused"}] * len(rows))
    config = PPOConfig(
        data=prompts,
        output=tempfile.mkdtemp(dir=folder),
        **{name: str(folder / name) for name in ("model", "reference", "reward")},
        **{"steps": 1, "batch_size": len(rows), "minibatches": 1, "epochs": 2, "max_tokens": 16, "warmup_ratio": 0.0}
        | {"max_new_tokens": max(len(response) for _, response in rows), "max_grad_norm": 1e9, "adam_eps": EPS}
        | {"learning_rate": RATES["model"] * EPS, "value_learning_rate": RATES["reward"] * EPS}
        | {"schedule": "constant", "value_schedule": "constant", **changes},
    )
    return PPO(config, backend=lambda policy: GivenResponses(folder, rows, config.temperature))


def weights_of(trainer):
    models = {"model": trainer.policy.model, "reward": trainer.value_model.model}
    return {of: {name: p.detach().double() for name, p in model.named_parameters()} for of, model in models.items()}


def our_step(folder, rows, **changes):
    """Returns what PPO makes of the responses: the metrics of a step of two updates, and the gradients of both updates
    of both models, read off the weights. Leaves the models after the first update as later_model and later_reward."""
    weights = []
    for epochs in (1, 2):
        with our_run(folder, rows, epochs=epochs, **changes) as trainer:
            weights += [weights_of(trainer)] if epochs == 1 else []
            metrics = next(trainer)
            weights.append(weights_of(trainer))
            if epochs == 1:
                trainer.policy.save_pretrained(folder / "later_model")
                trainer.value_model.save_pretrained(folder / "later_reward")
    return {"metrics": metrics, **{of: gradients_of(*(each[of] for each in weights), RATES[of]) for of in LEARNED}}


def gradients_of(before, between, after, rate):
    """The gradients of two updates. The first changes weights by rate times its gradient g, the second by rate times
    the mean (0.9 * 0.1 g + 0.1 h) / (1 - 0.9^2) that Adam's beta of 0.9 makes of both."""
    first = {name: (before[name] - between[name]) / rate for name in before}
    means = {name: (between[name] - after[name]) / rate for name in before}
    return [first, {name: 1.9 * means[name] - 0.9 * first[name] for name in before}]


def response_logprobs(model, rows, temperature):
    """log p of each response token at the temperature of sampling, and the entropy there."""
    logprobs, entropies = [], []
    for prompt, response in rows:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        table = (logits / temperature).log_softmax(-1)
        logprobs.append(torch.stack([table[t, token] for t, token in enumerate(response)]))
        entropies.append(-(table.exp() * table).sum(-1))
    return logprobs, entropies


class ByHand:
    """The same step in float64, a response at a time: transformers' own models, no padding, loops over tokens."""

    def __init__(self, folder, rows, settings):
        self.folder, self.rows, self.settings = Path(folder), rows, settings
        self.gradients = {name: [] for name in LEARNED}
        self.losses = {name: [] for name in LEARNED}
        with torch.no_grad():
            self.old, _ = self.policy_outputs(self.load("model"))
            ref, _ = self.policy_outputs(self.load("reference"))
            self.values = self.value_outputs(self.load("reward"))
            self.scores = self.final_scores(self.load("reward"))
        self.log_ratios = [q - p for p, q in zip(self.old, ref, strict=True)]  # log reference / policy
        self.rewards = [self.token_rewards(*each) for each in zip(self.log_ratios, self.scores, strict=True)]
        self.advantages = [self.gae(r, v.tolist()) for r, v in zip(self.rewards, self.values, strict=True)]
        self.returns = [a + v for a, v in zip(self.advantages, self.values, strict=True)]
        every = torch.cat(self.advantages)
        if settings.whiten:
            mean, deviation = every.mean(), every.var(correction=0).sqrt()
            self.advantages = [(a - mean) / deviation for a in self.advantages]
        policy, value_model = self.load("model"), self.load("reward")
        for _ in range(2):
            self.update(policy, value_model)

    def load(self, name):
        loader = AutoModelForSequenceClassification if "reward" in name else AutoModelForCausalLM
        return loader.from_pretrained(self.folder / name, dtype=torch.float64, attn_implementation="eager").eval()

    def policy_outputs(self, model):
        return response_logprobs(model, self.rows, self.settings.temperature)

    def hidden(self, model):
        return [(model.model(torch.tensor([p + r])).last_hidden_state[0], len(p)) for p, r in self.rows]

    def value_outputs(self, model):
        """The head where each response token is predicted: the value of the state before it."""
        return [model.score(states)[start - 1 : -1, 0] for states, start in self.hidden(model)]

    def final_scores(self, model):
        """The head at the last token, less the penalty of a response without an end."""
        end = tiny_tokenizer().eos_token_id
        scores = [model.score(states)[-1, 0].item() for states, _ in self.hidden(model)]
        kind, _, penalty = self.settings.missing_eos.partition(":")
        penalties = [0 if kind == "none" or r[-1] == end else float(penalty) for _, r in self.rows]
        return [score - penalty for score, penalty in zip(scores, penalties, strict=True)]

    def token_rewards(self, log_ratios, score):
        k1 = self.settings.kl_estimator == "k1"
        kl = [-r if k1 else math.exp(r) - 1 - r for r in log_ratios.tolist()]
        rewards = [-self.settings.kl_coef * x for x in kl]
        return [*rewards[:-1], rewards[-1] + score]

    def gae(self, rewards, values):
        after, advantages, running = 0.0, [], 0.0
        for reward, value in zip(reversed(rewards), reversed(values), strict=True):
            running = reward + self.settings.gamma * after - value + self.settings.gamma * self.settings.lam * running
            after = value
            advantages.insert(0, running)
        return torch.tensor(advantages, dtype=torch.float64)

    def update(self, policy, value_model):
        """The losses of an update and their gradients, by parameter; then a step against the gradients."""
        settings = self.settings
        advantages, old = torch.cat(self.advantages), torch.cat(self.old)
        logprobs, entropies = (torch.cat(each) for each in self.policy_outputs(policy))
        ratio, bound = (logprobs - old).exp(), settings.clip_range
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - bound, 1 + bound)
        self.log_steps = (logprobs - old).detach()
        self.clipped, self.entropy = (clipped > plain).double().mean().item(), entropies.mean().item()
        loss = torch.maximum(plain, clipped).mean()
        self.note("model", policy, loss, loss - settings.entropy_coef * entropies.mean())
        values, before, returns = (torch.cat(x) for x in (self.value_outputs(value_model), self.values, self.returns))
        bounded = before + (values - before).clamp(-settings.clip_range_value, settings.clip_range_value)
        plain, clipped = (values - returns) ** 2, (bounded - returns) ** 2
        self.values_clipped = (clipped > plain).double().mean().item()
        loss = torch.maximum(plain, clipped).mean() / 2
        self.note("reward", value_model, loss, settings.value_coef * loss)

    def note(self, name, model, loss, total):
        total.backward()
        self.losses[name].append(loss.item())
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        self.gradients[name].append(gradients)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATES[name] * parameter.grad
        model.zero_grad(set_to_none=True)


def assert_same_gradients(found, expected, tolerance=5e-5):
    """Fails where a parameter's gradient differs by more than this share of the largest gradient: weights that are
    near 1 show an update to the 24 bits of float32."""
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name].double() - gradient).abs().max().item()
        assert error <= tolerance * largest, f"{name}: {error / largest:.1e}"
