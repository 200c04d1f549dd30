"""Pairs of sentences in many languages: found, tokenised once, and put together in batches of equal length."""
