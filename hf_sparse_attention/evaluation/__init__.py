"""Measuring trained models at lengths beyond those they were trained at: perplexity and needles in a haystack."""
