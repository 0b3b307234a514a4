"""Measuring models: scores of text, and tasks made of them."""
