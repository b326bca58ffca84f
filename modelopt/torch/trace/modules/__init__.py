"""Symbols and graph rules of torch's own modules and operations."""
