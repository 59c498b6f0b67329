"""Share of needle answers found in the generated text."""
