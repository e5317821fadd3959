"""The topologies, one per file."""
