"""Settings of a small best-of-n."""

from loops import model_folder, write_rows

RULES = """
def early(prompts, responses, *, response_ids, topic):
    assert all(topic)
    return [sum(token < 120 for token in ids) - 0.01 * len(ids) for ids in response_ids]


def odd(prompts, responses, *, response_ids):
    return [sum(token % 2 for token in ids) for ids in response_ids]


def short(prompts, responses, *, response_ids):
    return [-float(len(ids)) for ids in response_ids]
"""


def search_settings(tmp_path, monkeypatch):
    """A model, prompts and rules in the working folder, as settings of best-of-n."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"prompt": f"prompt {n}", "topic": "t"} for n in range(5)]
    return {
        "model": model_folder(tmp_path / "model"),
        "data": write_rows(tmp_path / "prompts.jsonl", rows),
        "output": str(tmp_path / "best"),
        "reward": "best_rules:early,best_rules:short=0.001",
        "gold": "best_rules:short",
        "n": 4,
        "max_new_tokens": 5,
        "device": "cpu",
        "keep_unfinished": True,
    }


def arguments(settings):
    return [f"--{name}={value}" for name, value in settings.items()]
