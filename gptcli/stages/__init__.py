"""One module per stage: build the parts, call train()."""
