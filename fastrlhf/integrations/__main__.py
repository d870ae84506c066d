"""`python -m fastrlhf.integrations` prints the folder that belongs on PYTHONPATH for FASTRLHF_PATCH to work."""

from pathlib import Path

print(Path(__file__).parent / "startup")
