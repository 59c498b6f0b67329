"""Perplexity of the same target tokens under contexts of different lengths."""
