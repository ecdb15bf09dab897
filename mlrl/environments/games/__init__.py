"""Games of two over a few symbols, and what is known exactly about how to play them."""
