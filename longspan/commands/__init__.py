"""The commands of ``longspan``, one per file."""
