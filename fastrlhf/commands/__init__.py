"""What each command does: run, feedback, the report on a reward model, best-of-n, sweep, overoptimize, data tools."""
