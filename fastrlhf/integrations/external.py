"""Importing this patches the trainers that are imported already: for verl's VERL_USE_EXTERNAL_MODULES."""

from fastrlhf.integrations import patch

patch("auto")
