"""What commands share: responses to held-out prompts, labels, stages of a job, HTML, plots."""
