"""Models: pure-functional Flax modules that turn tokens into hidden states, logits and values."""
