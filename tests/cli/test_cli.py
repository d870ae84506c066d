import dataclasses
import os
import shlex
import subprocess
import sys
import unicodedata
import warnings

import pytest
import torch
from hooks import failing_update
from loops import ROOT, demonstrations, model_folder, pairs, write_rows
from transformers import AutoModelForCausalLM

import fastrlhf
from fastrlhf.cli.commands import COMMANDS, LOOP_PRODUCTS
from fastrlhf.cli.main import main
from fastrlhf.cli.options import parse
from fastrlhf.errors import NonFiniteError
from fastrlhf.runtime import distributed
from fastrlhf.runtime.jsonl import read_jsonl
from fastrlhf.runtime.output_folder import OutputFolder
from fastrlhf.runtime.resume_hint import LAST, LOOPS, command_line_of, command_of, resume_hint
from fastrlhf.runtime.terminal import plain_warnings, print_error, printable
from fastrlhf.settings.values import dump

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def arguments(tmp_path):
    options = {
        "model": model_folder(tmp_path / "model"),
        "data": demonstrations(tmp_path / "data.jsonl"),
        "output": tmp_path / "out",
        "template": "none",
        "max-length": 64,
        "device": "cpu",
    }
    return [f"--{name}={value}" for name, value in options.items()]


def test_help_lists_the_commands_and_each_has_its_own(capsys):
    assert main(["--help"]) == main([]) == 0
    overview = capsys.readouterr().out
    for command in ("sft", "reward", "ppo"):
        assert command in overview
        assert main([command, "--help"]) == 0
        assert "--learning-rate NUM" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == fastrlhf.__version__


def test_info_says_what_serves_each_op(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (torch.__version__, "instruction set", "threads", "cuda extension"):
        assert word in text
    rows = [line.split() for line in text.splitlines()]
    assert ["gae", "native"] in [row[:2] for row in rows]


def test_the_loops_run_from_a_yaml_file(arguments, tmp_path, capsys):
    file = tmp_path / "sft.yaml"
    file.write_text("batch_size: 4\nepochs: 2\nlearning_rate: 1e-3\n")
    assert main(["sft", "--config", str(file), *arguments, "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "24 of 24 rows used" in out
    assert f"model: {tmp_path / 'out' / 'model'}" in out
    assert len(read_jsonl(tmp_path / "out" / "metrics.jsonl")) == 6
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    data = pairs(tmp_path / "pairs.jsonl")
    assert main(["reward", *arguments[:1], f"--data={data}", f"--output={tmp_path / 'rm'}", *arguments[3:]]) == 0
    assert (tmp_path / "rm" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["stf"], "unknown command 'stf'; did you mean sft?"),
        (["data"], "Each has its --help"),
        (["data", "convert", "in.jsonl", "--format", "oasst"], "missing OUT"),
        (["sft", "--lerning-rate", "1"], "unknown option --lerning-rate; did you mean --learning-rate?"),
        (["sft", "--model", "m"], "missing --data, --output"),
        (["sft", "--model=m", "--data=d", "--output=o", "--batch-size=many"], "batch_size must be a whole number"),
    ],
)
def test_bad_usage_exits_with_2_and_a_line(command, text, capsys):
    assert main(command) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert "Traceback" not in captured.err


def test_bad_input_exits_with_1_and_a_line(arguments, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    cases = {
        f"--data={broken}": f"{broken}, line 2: not JSON",
        f"--data={tmp_path / 'none.jsonl'}": "no file",
        "--data=" + write_rows(tmp_path / "odd.jsonl", [{"question": "a"}]): "has the columns question",
        "--model=./nowhere": "./nowhere",
    }
    for option, text in cases.items():
        kept = [a for a in arguments if a.split("=")[0] != option.split("=")[0]]
        assert main(["sft", *kept, option]) == 1
        error = capsys.readouterr().err
        assert error.startswith("fastrlhf sft: error: ")
        assert text in error
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_made_is_a_line(arguments, tmp_path, capsys):
    (tmp_path / "file").touch()
    data = write_rows(tmp_path / "shared.json", [{"conversations": [{"from": "gpt", "value": "Hi"}]}])
    convert = ["data", "convert", data, str(tmp_path / "file" / "out.jsonl"), "--format=sharegpt"]
    kept = [a for a in arguments if not a.startswith("--output")]
    for command in (["sft", *kept, f"--output={tmp_path / 'file' / 'out'}"], convert):
        assert main(command) == 1
        assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "joined"), [(["--help"], False), (["data", "check", "DATA"], False), (["nonsense"], True)], ids=str
)
def test_a_reader_that_has_enough_is_no_traceback(tmp_path, command, joined):
    """joined: both streams into one pipe, as by 2>&1 | head"""
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}])
    command = [sys.executable, "-m", "fastrlhf", *(data if part == "DATA" else part for part in command)]
    errors = subprocess.STDOUT if joined else subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True) as run:
        run.stdout.close()
        told = "" if joined else run.stderr.read()
    assert (run.returncode, told) == (1, "")  # 120: the interpreter could not flush


PIPES = """
import os, sys
from fastrlhf.cli import main as cli
from fastrlhf.trainers import sft

class SFT:
    best = None

    def __init__(self, config):
        {before}

    def __iter__(self):
        raise BrokenPipeError(32, "the judge is gone")

sft.SFT = SFT
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_pipe_that_is_not_ours_breaks_with_a_message(arguments):
    """As a judge's socket. Nor is stderr muted when the reader of stdout has enough; and a stream may be missing."""

    def run(before, **given):
        command = [sys.executable, "-c", PIPES.format(before=before), "sft", *arguments]
        return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **given)

    judge = run("pass", stdout=subprocess.PIPE)
    assert judge.returncode == 1 and judge.stderr.splitlines()[-1] == "BrokenPipeError: [Errno 32] the judge is gone"
    assert "the judge is gone" in run("sys.stdout = None", stdout=subprocess.PIPE).stderr
    reader, writer = os.pipe()
    os.close(reader)
    told = run("import atexit; atexit.register(lambda: print('still here', file=sys.stderr))", stdout=writer)
    os.close(writer)
    assert (told.returncode, told.stderr) == (1, "still here\n")


def test_an_error_that_is_not_ours_keeps_its_traceback(arguments):
    with failing_update(1, KeyError("missing")), pytest.raises(KeyError):
        main(["sft", *arguments])


def test_interrupting_says_how_to_go_on(arguments, capsys, tmp_path):
    with failing_update(3, KeyboardInterrupt()):
        assert main(["sft", *arguments, "--batch-size=4", "--save-every=1"]) == 130
    told = capsys.readouterr().err.splitlines()
    newest, settings = (tmp_path / "out" / name for name in ("checkpoints/step-000002", "config.yaml"))
    assert told[0] == f"fastrlhf sft: interrupted; the newest checkpoint is {newest}"
    assert told[1:] == [f"go on with: fastrlhf sft --config {settings} --resume"]
    assert main(["sft", *arguments, "--batch-size=4", "--save-every=1"]) == 1
    found = "is not empty: it holds a run of fastrlhf sft, 2 of 6 steps done, not finished; --resume (resume=True)"
    assert found in capsys.readouterr().err
    assert main(["sft", "--config", str(settings), "--resume"]) == 0
    assert "resuming from" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["sft", "run"])
def test_interrupting_before_anything_is_written_says_so(arguments, monkeypatch, capsys, tmp_path, command):
    from fastrlhf.commands.run import Run
    from fastrlhf.runtime.lock import Lock
    from fastrlhf.trainers.sft import SFT

    class Loading:
        def __init__(self, config):
            self.lock = Lock(tmp_path / "out")
            assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
            raise KeyboardInterrupt

    made = {"sft": SFT, "run": Run}[command]
    monkeypatch.setattr(f"{made.__module__}.{made.__name__}", Loading)
    given = arguments if command == "sft" else [f"--output={tmp_path / 'out'}"]
    assert main([command, *given]) == 130
    said = f"fastrlhf {command}: interrupted; nothing had been written yet; give the same command again\n"
    assert capsys.readouterr().err == said


SETTINGS = {
    "label": {"judge": "j", "data": "d"},
    "revise": {"model": "m", "data": "d"},
    "iterate": {"model": "m", "data": "d", "gold": "a:b"},
    "run": {},
    "sweep": {"model": "m", "data": "d", "first": "a:b", "second": "c:d"},
    "overoptimize": {"model": "m", "data": "d", "gold": "a:b", "eval_data": "e"},
}
LOOP = {"model": "m", "data": "d", "reward": "a:b", "template_kwargs": {"a": 1}, "stop": ("x", "y")}


@pytest.mark.parametrize("command", [name for name in COMMANDS if hasattr(COMMANDS[name].config, "resume")])
@pytest.mark.parametrize("how", ["resume", "overwrite", "fresh"])
def test_the_command_to_go_on_with_gives_every_command_the_settings_it_had(tmp_path, command, how):
    made = COMMANDS[command].config
    fields = {field.name for field in dataclasses.fields(made)}
    options = SETTINGS.get(command, {name: value for name, value in LOOP.items() if name in fields})
    config = made(**options, output=str(tmp_path / "my runs"), **({how: True} if how != "fresh" else {}))
    folder = OutputFolder(config)
    folder.open()
    folder.close()
    (tmp_path / "my runs/checkpoints/step-000001").mkdir(parents=True)
    program, *arguments = shlex.split(resume_hint(command, config).partition("with: ")[2])
    assert program == "fastrlhf" and arguments[: len(command.split())] == command.split()
    again = parse(made, arguments[len(command.split()) :])
    assert dump(again) == dump(dataclasses.replace(config, resume=True, overwrite=False))


def test_a_run_in_a_folder_is_called_by_its_command_and_ends_with_a_file_of_it():
    for name, command in COMMANDS.items():
        if hasattr(command.config, "resume"):
            assert command_of(command.config.__name__) == name
    for name, file in LAST.items():
        assert file in COMMANDS[name].products.values()
    assert {name for name in COMMANDS if COMMANDS[name].products is LOOP_PRODUCTS} == {*LOOPS}


def test_under_torchrun_the_command_to_go_on_with_is_torchruns(monkeypatch):
    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, 2))
    expected = "torchrun --nproc-per-node 2 -m fastrlhf sft --config out/config.yaml"
    assert shlex.join(command_line_of("sft", "out")) == expected


def test_an_error_says_what_it_left(arguments, capsys, tmp_path):
    out, endings = tmp_path / "out", {}
    for number in (1, 2, 3):
        with failing_update(number, NonFiniteError("the loss is nan")):
            assert main(["sft", *arguments, "--batch-size=4", "--save-every=2", "--overwrite"]) == 1
        endings[number] = capsys.readouterr().err.splitlines()[-2:]
    command = f"fastrlhf sft --config {out / 'config.yaml'}"
    assert endings == {
        1: [f"{out} holds the settings of this run and no step yet", f"start again with: {command}"],
        2: [f"there is no checkpoint yet in {out}", f"start anew with: {command} --overwrite"],
        3: [
            f"the newest checkpoint is {out / 'checkpoints/step-000002'}",
            f"go on with: {command} --resume --no-overwrite",
        ],
    }
    assert main(["sft", *arguments, "--batch-size=4"]) == 1  # refused before anything was written
    assert capsys.readouterr().err.splitlines()[-1].startswith("fastrlhf sft: error: output: ")


def test_python_m_runs_it():
    run = subprocess.run([sys.executable, "-m", "fastrlhf", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == fastrlhf.__version__


def test_a_warning_of_ours_is_a_line_and_another_keeps_its_place():
    usual = warnings.formatwarning
    with plain_warnings():
        ours = warnings.formatwarning("a checkpoint is damaged", UserWarning, fastrlhf.__file__, 7)
        other = warnings.formatwarning("deprecated", UserWarning, torch.__file__, 7)
    assert ours == "warning: a checkpoint is damaged\n"
    assert other.startswith(f"{torch.__file__}:7: UserWarning: deprecated")
    assert warnings.formatwarning is usual


FOREIGN = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202egnp.exe\u2066 zero\u200bwidth\u2028line\u0085\r\ud800"


def is_harmless(text):
    return not any(unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp") for each in text if each not in "\n\t")


def test_what_a_terminal_obeys_or_hides_is_shown_as_an_escape_and_all_else_stays():
    assert printable(FOREIGN).encode("ascii")  # nothing of it is hidden
    assert printable("\x1b[31m\u202e\u200b") == r"\x1b[31m\u202e\u200b"
    kept = "tab\tline\n Größe, 名前, ١٢٣, é, \u3000, 🙂, <b>, \\x1b"
    assert printable(kept) == kept
    harmful = [chr(n) for n in range(0x110000) if not is_harmless(chr(n))]
    assert len(harmful) > 2000 and all(printable(each).isascii() for each in harmful)


def test_names_that_files_and_people_bring_cannot_steer_the_terminal(arguments, tmp_path, capsys):
    foreign = str(tmp_path / FOREIGN.replace("\ud800", ""))
    write_rows(foreign, [{FOREIGN: "x"}] * 8)
    roles = write_rows(tmp_path / "roles.jsonl", [{"messages": [{"role": FOREIGN, "content": "x"}]}] * 8)
    columns = write_rows(tmp_path / "columns.jsonl", [{"prompt": "ab", "completion": "cc", FOREIGN: FOREIGN}] * 8)
    others = [each for each in arguments if not each.startswith(("--data", "--output"))]
    for command, status in (
        (["sft", *others, f"--data={foreign}", f"--output={tmp_path / 'a'}"], 1),
        (["sft", *others, f"--data={roles}", f"--output={tmp_path / 'b'}"], 1),
        (["sft", *others, f"--data={columns}", f"--output={foreign}.out", "--batch-size=8", "--epochs=1"], 0),
        (["data", "check", foreign], 1),
        (["data", "check", roles], 1),
        (["sft", *arguments, f"--{FOREIGN}=1"], 2),
        ([FOREIGN], 2),
    ):
        assert main(command) == status
        said = capsys.readouterr()
        assert is_harmless(said.out + said.err), command
        assert r"\x1b[31mred" in said.out + said.err, command


def test_a_traceback_cannot_steer_the_terminal(capsys):
    try:
        raise RuntimeError(FOREIGN)
    except RuntimeError as error:
        print_error(RuntimeError, error, error.__traceback__)
    said = capsys.readouterr().err
    assert is_harmless(said) and r"RuntimeError: \x1b[31mred" in said
