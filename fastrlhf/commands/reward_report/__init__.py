"""`fastrlhf evaluate reward`: what the figures of `fastrlhf.stats` say of a reward model, as a page and as JSON."""
