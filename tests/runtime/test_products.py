"""What a run has finished is compared when it is resumed; lines of files that it adds to carry checksums."""

import json
import shutil
from pathlib import Path

import pytest
from loops import demonstrations, model_folder

from fastrlhf import SFT, SFTConfig
from fastrlhf.runtime.jsonl import append, as_json, read_jsonl, whole_lines, with_checksum
from fastrlhf.runtime.output_folder import OutputFolder
from fastrlhf.runtime.products import check_products, forget, note_new, record, recorded

pytestmark = pytest.mark.usefixtures("one_thread")


def finished(tmp_path):
    """A folder with a model that was noted."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"a": 1}')
    (tmp_path / "model/weights").write_bytes(bytes(99))
    record(tmp_path, "model")
    return tmp_path


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "a byte": lambda path: path.write_bytes(path.read_bytes().replace(b"1", b"0")),
    "a folder": lambda path: path.unlink() or path.mkdir(),
    "a link to nowhere": lambda path: path.unlink() or path.symlink_to("/proc/no-such-file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_changed_file_is_named_with_what_to_do(tmp_path, damage):
    folder = finished(tmp_path)
    check_products(folder)
    (folder / "model/README.md").write_text("a user's own")
    check_products(folder)
    DAMAGES[damage](folder / "model/config.json")
    what = "has changed since it was written" if damage in ("empty", "a byte") else "is missing"
    with pytest.raises(
        ValueError, match=rf"resume: {folder}/model/config.json {what}; restore it, or delete .*/model "
    ):
        check_products(folder)
    shutil.rmtree(folder / "model")
    check_products(folder)  # it is made again


def test_what_was_noted_first_stays_until_it_is_made_anew(tmp_path):
    folder = finished(tmp_path)
    before = recorded(folder)
    (folder / "model/weights").write_bytes(b"other")
    note_new(folder, "model")
    assert recorded(folder) == before
    forget(folder, "model")
    note_new(folder, "model")
    check_products(folder)
    assert recorded(folder) != before


@pytest.mark.parametrize("text", ["", "[]", '{"model": 3}', "[" * 100_000, "\0", None])
def test_damaged_notes_say_nothing(tmp_path, text):
    folder = finished(tmp_path)
    path = folder / "products.json"
    path.write_text(path.read_text().replace("weights", "weightz") if text is None else text)
    assert recorded(folder) == {}
    check_products(folder)


def test_a_run_does_not_go_on_with_a_damaged_model_and_makes_a_missing_one_again(tmp_path):
    settings = {"model": model_folder(tmp_path / "base"), "data": demonstrations(tmp_path / "rows.jsonl")}
    settings |= {"output": str(tmp_path / "out"), "batch_size": 12, "epochs": 1, "max_length": 64}
    SFT(SFTConfig(**settings)).run()
    model = Path(settings["output"]) / "model"
    whole = {path.name: path.read_bytes() for path in model.iterdir()}
    (model / "model.safetensors").write_bytes(whole["model.safetensors"][:-1])
    with pytest.raises(ValueError, match=r"model/model.safetensors has changed .* delete \S*/out/model to have"):
        SFT(SFTConfig(**settings, resume=True))
    shutil.rmtree(model)
    left = model.with_name("products.json.partial")
    left.write_text("what a kill leaves")
    SFT(SFTConfig(**settings, resume=True)).run()
    assert not left.exists()
    assert {path.name: path.read_bytes() for path in model.iterdir()} == whole


def test_checkpoints_that_are_a_link_to_nowhere_end_no_run_of_before(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    (out / "checkpoints").symlink_to(tmp_path / "not-mounted")
    for how in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(FileNotFoundError, match=r"out/checkpoints is a link to what is not there"):
            OutputFolder(SFTConfig(model="m", data="d", output=str(out), **how))
    assert (out / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("name", ["config.yaml", "inputs.json", "steps.json", "products.json", "timing.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=rf"{name} is no file, as a run has it: delete it to go on"):
        OutputFolder(SFTConfig(model="m", data="d", output=str(tmp_path), resume=True))


@pytest.mark.parametrize("place", range(0, 40, 3))
def test_a_line_with_a_seal_is_known_from_any_other(tmp_path, place):
    path = tmp_path / "verdicts.jsonl"
    for step in (1, 2):
        append(path, {"step": step, "orders": [0.125, 0.5]}, seal=True)
    assert [row["step"] for row in read_jsonl(path)] == [1, 2] and len(whole_lines(path, "step")) == 2
    first, second = path.read_bytes().splitlines(keepends=True)
    damaged = bytearray(second)
    damaged[place] ^= 1
    path.write_bytes(first + damaged)
    with pytest.warns(UserWarning, match="line 2: damaged"):
        assert whole_lines(path, "step") == [first]


def test_a_sealed_object_is_json_with_all_its_values():
    row = {"a": [1.5, "}"], "b": {"crc32": 3}, "c": "é"}
    assert {**json.loads(with_checksum(json.dumps(row))), "crc32": 0} == {**row, "crc32": 0}


def test_letters_stay_and_lone_surrogates_are_escaped():
    rows = [{"é": "名"}, {"a\udfff": ["\ud800"]}]
    texts = [as_json(row) for row in rows]
    assert texts[0] == '{"é": "名"}' and [json.loads(text.encode()) for text in texts] == rows
