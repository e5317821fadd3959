"""Chunkwise linear attention with decay: the engine behind every variant whose transition is diagonal."""
