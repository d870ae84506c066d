"""Writes docs/ops.md from the docstrings of the ops: python -m docs.build_ops"""

import inspect
from pathlib import Path

from fastrlhf import ops

PAGE = Path(__file__).parent / "ops.md"
TOP = """# Ops
Made from the docstrings by `python -m docs.build_ops`; change those, not this page.

"""


def page() -> str:
    """The text of docs/ops.md."""
    text = TOP + (inspect.getdoc(ops) or "") + "\n\n"
    text += "".join(f"* [`{name}`](#{name})\n" for name in ops.__all__)
    for name in ops.__all__:
        function = getattr(ops, name)
        parameters = ", ".join(str(p).split(":")[0] + _default(p) for p in _with_star(function))
        text += f"\n## {name}\n```text\n{name}({parameters})\n\n{inspect.getdoc(function)}\n```\n"
    return text


def _with_star(function: object) -> list[inspect.Parameter | str]:
    """The parameters, a star before the first that must be named."""
    parameters = list(inspect.signature(function).parameters.values())  # type: ignore[arg-type]
    first = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    return parameters if first is None else [*parameters[:first], "*", *parameters[first:]]


def _default(parameter: inspect.Parameter | str) -> str:
    if isinstance(parameter, str) or parameter.default is parameter.empty:
        return ""
    return f"={parameter.default!r}"


if __name__ == "__main__":
    PAGE.write_text(page())
