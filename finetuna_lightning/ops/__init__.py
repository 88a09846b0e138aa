"""Reference operators and their dispatch: torch and Triton only."""
