"""Softmax attention of blocks of queries on blocks of keys, and their merge by log-sum-exp."""
