"""Is the arithmetic right on this machine? Each promise of the package, tried on the user's model and device."""
