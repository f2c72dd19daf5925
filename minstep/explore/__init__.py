"""Watching a model at work: walk, trace page, logit lens, drafts and experts."""
