"""Runs and results as tables and as pages that need nothing from a network."""
