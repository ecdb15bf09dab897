"""The three loops: online, iterated, offline. A loop is read top to bottom; everything else is an argument."""
