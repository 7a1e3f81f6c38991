"""Measuring: perplexity, memory, and the records that results are kept in."""
