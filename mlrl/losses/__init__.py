"""Loss functions: equations on arrays, and the thin functions of (scores, batch) that gin lists and a loop sums."""
