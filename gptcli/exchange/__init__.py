"""Models in from other formats and out to them, each proved by its logits."""
