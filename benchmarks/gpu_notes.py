"""What the GPU kernels should take on an H200, before anyone has run them: python -m benchmarks.gpu_notes > FILE

FILE is benchmarks/GPU_NOTES.md.
"""

from benchmarks import gpu_model as model
from benchmarks.gpu_cases import CASES

HEAD = f"""# The GPU kernels on an H200: floors and predictions

Made by `python -m benchmarks.gpu_notes > benchmarks/GPU_NOTES.md`. **No kernel has run on a GPU yet**: every time below
is computed, and the column "measured" waits for one. Times are of the device, in microseconds; what Python needs to
launch is not in them.

* **Floor**: inputs and outputs once at {model.BANDWIDTH / 1e12:g} TB/s, or matrix products at {model.MATRIX / 1e12:g}
  TFLOP/s (bf16), whichever is longer.
* **Predicted**: {model.LAUNCH * 1e6:g} µs a launch, and for each launch the longest of
  memory at {model.BANDWIDTH / 1e12:g} TB/s;
  L2 at {model.L2_BANDWIDTH / 1e12:g} TB/s, for what its {model.L2_BYTES / 1e6:g} MB still hold;
  {model.SM_BYTES} bytes a clock for each multiprocessor that has a block;
  {model.LANES} lane instructions, {model.EXPS} exponentials and {model.DOUBLES} fp64 instructions a clock of each
  ({model.SMS} multiprocessors at {model.CLOCK / 1e9:g} GHz);
  and waiting: rounds of resident blocks x turns of a block x {model.MEMORY_TURN * 1e6:g} µs, which is a load from
  memory and what depends on it ({model.L2_TURN * 1e6:g} µs from L2).
  All rates but those of the floor are estimates, which a measurement will correct.
* **Operations**: lane instructions (counted in the source), exponentials, fp64 instructions, and those of tensor cores,
  padding included.

| op | shape | launches | bytes needed | from memory | from L2 | operations | floor µs | predicted µs | ratio | bound\
 by | measured |
|---|---|---|---:|---:|---:|---|---:|---:|---:|---|---|
"""


def page() -> str:
    """benchmarks/GPU_NOTES.md."""
    lines = [case.row() for case in CASES] + ["", "## Why", ""]
    for case in CASES:
        blocks = ", then ".join(
            f"{n.grid} block{'s' * (n.grid > 1)} of {n.warps} warps, {n.resident} resident" for n in case.launches
        )
        lines.append(f"* `{case.op}`, {case.shape} ({case.source}; {blocks}): {case.why}.")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
