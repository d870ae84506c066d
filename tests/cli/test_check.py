"""`fastrlhf check`: its table is complete and shows an op that is wrong."""

import pytest
import torch

from fastrlhf.cli import check
from fastrlhf.cli.main import main
from fastrlhf.ops._registry import BACKENDS, OPS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_matrix_has_every_op_backend_and_dtype_and_nothing_fails(capsys):
    assert main(["check", "--device", "cpu", "--matrix"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()][1:]
    assert [row[:2] for row in rows] == [[name, backend] for name in OPS for backend in ("reference", "native")]
    served = {name for name in OPS if BACKENDS[name]["cpu"] == "native"}
    assert {row[0] for row in rows if row[1] == "native" and row[2] == "ok"} == served


def test_a_wrong_kernel_fails_and_sets_the_exit_status(monkeypatch, capsys):
    right = OPS["gae"].apply
    wrong = check.Op(**{**vars(OPS["gae"]), "apply": lambda *args: [x + 1e-3 for x in right(*args)]})
    monkeypatch.setattr(check, "OPS", {"gae": wrong, "approx_kl": OPS["approx_kl"]})
    assert main(["check", "--device=cpu", "--matrix"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "FAIL" in line] == ["gae"]


def test_half_precision_is_refused_by_its_name_or_fails():
    def broken(rewards, *_):
        raise TypeError("no kernel" if rewards.dtype == torch.bfloat16 else "gae: rewards must be float32, got float16")

    wrong = check.Op(**{**vars(OPS["gae"]), "forward": broken})
    assert check._cell(wrong, wrong.reference, "cpu", torch.bfloat16) == ("FAIL TypeError", 1)
    assert check._cell(wrong, wrong.reference, "cpu", torch.float16) == ("as float32", 0)


def test_an_output_that_is_not_finite_fails():
    exact = torch.ones(3, dtype=torch.float64)
    error, allowed = check._error(torch.tensor([1.0, torch.nan, 1.0]), exact, exact.float(), None)
    assert error > allowed


def test_a_rare_row_of_another_draw_is_left_out_and_more_of_them_fail():
    tokens, logprobs = torch.arange(4000), torch.randn(4000)
    other, another = tokens.clone(), tokens.clone()
    other[7] = another[::2] = 9
    left = check._of_equal_draws([other, logprobs], [tokens, logprobs], [tokens, logprobs])
    assert [[len(t) for t in tensors] for tensors in left] == [[3999, 3999]] * 3 and torch.equal(left[0][0], left[1][0])
    kept = check._of_equal_draws([another, logprobs], [tokens, logprobs], [tokens, logprobs])
    assert kept[0][0] is another and check._error(another, tokens, tokens, None)[0] > 0


def test_every_op_is_timed_at_a_size_that_it_makes_from_its_schema(monkeypatch, capsys):
    monkeypatch.setattr(check, "_times", lambda function, device: [function() is None or 1.0])
    monkeypatch.setattr(check, "matrix", lambda device: [])  # which has a test above
    rows, size, width, num_tokens = check.SIZES["cpu"]
    monkeypatch.setitem(check.SIZES, "cpu", (rows, size // 8, width, num_tokens // 8))
    assert main(["check", "--device", "cpu"]) == 0
    table = capsys.readouterr().out.split("of limit\n")[1]
    assert [line.split()[0] for line in table.splitlines()] == list(OPS)


def test_help_fits_a_screen_and_unknown_options_are_refused(capsys):
    assert main(["check", "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) <= 24
    assert main(["check", "--devise", "cpu"]) == 2
    assert "unknown option --devise" in capsys.readouterr().err
