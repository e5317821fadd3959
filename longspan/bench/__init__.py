"""Measuring on the ranks at hand: ``longspan bench exchange``."""
