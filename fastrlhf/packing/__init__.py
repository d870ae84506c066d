"""The packed layout of sequences, and how a pack is cut into micro-batches."""

from fastrlhf.packing.layout import Packed, pack

__all__ = ["Packed", "pack"]
