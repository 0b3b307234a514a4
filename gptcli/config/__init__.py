"""Recipes: what may stand in them (schema), how they are read (load), what follows from them (plan). No torch."""
