"""Searches for what to prune, one paper a file."""
