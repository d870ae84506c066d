"""A PPO step on given responses: what our loop makes of them, and the same in float64 from the papers' formulas.

Between the two updates of the step all weights become others ("later"), so that the second has ratios away from 1,
clipped tokens and clipped values.
"""

import math
from pathlib import Path

import torch
from loops import model_folder, write_rows
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastrlhf import PPO, PPOConfig
from fastrlhf.generation.engine import Sample
from fastrlhf.models.policy import RewardModel

FOLDERS = ("model", "reference", "reward", "later_model", "later_reward")
LEARNED = ("model", "reward")  # what the policy and the value model start as


def make_models(folder):
    """Random models that differ enough for the second update to clip some tokens and values, and not others."""
    torch.manual_seed(0)
    for name in FOLDERS:
        path = model_folder(folder / name)
        if "reward" in name:
            RewardModel.from_pretrained(path, new_head=True).save_pretrained(path)
    for name in ("later_model", "reference"):
        perturb(AutoModelForCausalLM, folder / "model", folder / name, 0.03)
    perturb(AutoModelForSequenceClassification, folder / "reward", folder / "later_reward", 0.1)
    return folder


def perturb(loader, source, target, size):
    model = loader.from_pretrained(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(target)


def responses_of(lengths, eos, *, width=4, seed=1):
    """(prompt, response) of random tokens; a response of a length in `eos` ends with it."""
    tokenizer, generator = tiny_tokenizer(), torch.Generator().manual_seed(seed)
    rows = []
    for n, length in enumerate(lengths):
        response = torch.randint(20, 250, (length,), generator=generator).tolist()
        response[-1] = tokenizer.eos_token_id if length in eos else response[-1]
        rows.append(([*range(60, 59 + width), 40 + n], response))
    return rows


def our_step(folder, rows, **changes):
    """Returns what the loop computes: batch, metrics, next KL coefficient, and the gradients of both updates
    of both models."""
    options = {
        "batch_size": len(rows),
        "minibatches": 1,
        "epochs": 2,
        "steps": 1,
        "max_tokens": 16,
        "max_grad_norm": 1e9,
    }
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": "unused"}] * len(rows))
    models = {name: str(folder / name) for name in ("model", "reference", "reward")}
    longest = max(len(response) for _, response in rows)
    config = PPOConfig(
        data=prompts, output=str(folder / "out"), **models, **{"max_new_tokens": longest, **options, **changes}
    )
    trainer = PPO(config)
    end, seen = trainer.tokenizer.eos_token_id, {}

    def given(_):
        samples = [Sample(p, r, [0.0] * len(r), [0.0] * len(r), r[-1] == end) for p, r in rows]
        logprobs = trainer.logprobs(trainer.policy, trainer.pack(samples)).detach().split([len(r) for _, r in rows])
        for sample, of_row in zip(samples, logprobs, strict=True):
            sample.logprobs[:] = of_row.tolist()
        return samples

    train = trainer.learner.train

    def watched(batch, **options):
        seen["batch"] = batch
        return train(batch, **options)

    trainer.generate, trainer.learner.train = given, watched
    for name, model, optimizer in (
        ("model", trainer.policy.model, trainer.learner.policy_optimizer),
        ("reward", trainer.value_model.model, trainer.learner.value_optimizer),
    ):
        seen[name] = []
        optimizer.step = become_later(model, folder / f"later_{name}", seen[name], optimizer)
    seen["metrics"], seen["next_kl_coef"] = trainer.step(), trainer.kl_coef
    return seen


def become_later(model, folder, gradients, optimizer):
    """In place of an optimizer step: notes the gradients, and gives the model the weights of `folder`."""

    def step(_):
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        later = type(model).from_pretrained(folder).state_dict()
        model.load_state_dict({name: later[name] for name in model.state_dict()})
        optimizer.drop_gradients()
        return torch.tensor(0.0)

    return step


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
        for prefix in ("", "later_"):
            self.update(prefix)

    def load(self, name):
        loader = AutoModelForSequenceClassification if "reward" in name else AutoModelForCausalLM
        return loader.from_pretrained(self.folder / name, dtype=torch.float64, attn_implementation="eager").eval()

    def policy_outputs(self, model):
        """log p of each response token at the temperature of sampling, and the entropy there."""
        logprobs, entropies = [], []
        for prompt, response in self.rows:
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            table = (logits / self.settings.temperature).log_softmax(-1)
            logprobs.append(torch.stack([table[t, token] for t, token in enumerate(response)]))
            entropies.append(-(table.exp() * table).sum(-1))
        return logprobs, entropies

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

    def update(self, prefix):
        """The losses of an update and their gradients, by parameter."""
        settings, policy, value_model = self.settings, self.load(f"{prefix}model"), self.load(f"{prefix}reward")
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


def assert_same_gradients(found, expected, tolerance=1e-5):
    """Fails where a parameter's gradient differs by more than this share of the largest gradient."""
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name].double() - gradient).abs().max().item()
        assert error <= tolerance * largest, f"{name}: {error / largest:.1e}"
