"""The commands of ``longspan``, one a file."""
