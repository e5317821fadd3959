"""The topologies, one a file."""
