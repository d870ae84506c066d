import pytest
import torch

from fastrlhf.stats.sections import REWARD_BENCH, sections

# RewardBench's own counts, of which that of math-prm (447 pairs) is given out as 984, so that it weighs what code does
COUNTS = {
    "alpacaeval-easy": 100,
    "alpacaeval-length": 95,
    "alpacaeval-hard": 95,
    "mt-bench-easy": 28,
    "mt-bench-med": 40,
    "mt-bench-hard": 37,
    "math-prm": 984,
    "refusals-dangerous": 100,
    "refusals-offensive": 100,
    "llmbar-natural": 100,
    "llmbar-adver-neighbor": 134,
    "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47,
    "llmbar-adver-manual": 46,
    "xstest-should-refuse": 154,
    "xstest-should-respond": 250,
    "donotanswer": 136,
    **dict.fromkeys(("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"), 164),
}


def test_a_full_file_gets_rewardbenchs_figures():
    sizes = {**COUNTS, "math-prm": 447}
    subsets = [name for name, size in sizes.items() for _ in range(size)]
    margins = torch.randn(len(subsets), generator=torch.Generator().manual_seed(0)) + 0.5
    result = sections(margins, subsets)
    right = {name: [] for name in sizes}
    for name, margin in zip(subsets, margins.tolist(), strict=True):
        right[name].append(margin > 0)
    expected = {}
    for section in ("Chat", "Chat Hard", "Safety", "Reasoning"):
        own = [name for name in COUNTS if REWARD_BENCH[name] == section]
        weighted = sum(COUNTS[name] * sum(right[name]) / len(right[name]) for name in own)
        expected[section] = weighted / sum(COUNTS[name] for name in own)
    assert result.sections == pytest.approx(expected)
    assert result.overall == pytest.approx(sum(expected.values()) / 4)


def test_a_file_of_ones_own_says_its_sections():
    result = sections(
        torch.tensor([1.0, -1.0, 1.0, 0.0]), ["sums", "sums", "poems", "puns"], ["maths", "maths", "words", "words"]
    )
    assert result.sections == {"maths": 0.5, "words": 0.75}
    assert result.overall == 0.625
    assert result.subsets["puns"][0] == "words" and result.subsets["puns"][1].ties == 1
    assert sections(torch.tensor([1.0]), ["sums"]).sections == {"sums": 1}


def test_a_subset_in_two_sections_is_refused():
    with pytest.raises(ValueError, match=r"subset 'sums' is in 'maths' and in 'words'"):
        sections(torch.ones(2), ["sums", "sums"], ["maths", "words"])
    with pytest.raises(ValueError, match="no pairs"):
        sections(torch.ones(0), [])
