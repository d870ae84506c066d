"""pytest plugin, in verl's tests: a name that verl of 2026-01 imports and transformers 5 dropped."""

import transformers

if not hasattr(transformers, "AutoModelForVision2Seq"):
    transformers.AutoModelForVision2Seq = transformers.AutoModelForImageTextToText
