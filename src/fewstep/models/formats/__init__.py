"""Formats of models on disk."""
