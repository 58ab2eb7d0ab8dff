"""Folds batch norms, and writes networks for programs that do without this package."""
