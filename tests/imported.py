"""The rows of the fixtures of other formats."""

from pathlib import Path

from fastrlhf.commands.data_convert import converted
from fastrlhf.data import Report
from fastrlhf.settings.data import DataConvertConfig

FIXTURES = Path(__file__).parent / "fixtures"


def made(name, file=None, **options):
    """(rows, report) of a fixture."""
    file = file or next(FIXTURES.glob(f"{name}.json*"))
    config = DataConvertConfig(
        file=str(file), out="out.jsonl", format=name.partition("_")[0], max_rejected=1, **options
    )
    report = Report(config.file)
    return list(converted(config, report)), report
