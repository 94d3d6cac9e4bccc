"""Potluck trains models on the machines people bring."""

__version__ = "0.1.0"
