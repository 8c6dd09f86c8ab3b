"""Measurements; nothing here is needed to use the package."""
