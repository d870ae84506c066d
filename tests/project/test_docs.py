import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from fastrlhf import ops

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_the_ops_is_up_to_date():
    spec = importlib.util.spec_from_file_location("build_ops", DOCS / "build_ops.py")
    build_ops = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_ops)
    assert (DOCS / "ops.md").read_text() == build_ops.page(), "run python -m docs.build_ops"


@pytest.mark.parametrize("name", ops.__all__)
def test_every_op_says_what_it_raises(name):
    assert "\nRaises: " in inspect.getdoc(getattr(ops, name)), f"{name} has no line Raises"


def test_every_op_is_on_the_api_page():
    assert (
        re.findall(r"^::: fastrlhf\.ops\.\w+\.(\w+)$", (DOCS / "api_ops.md").read_text(), re.MULTILINE) == ops.__all__
    )
