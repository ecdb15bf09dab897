"""What fits on which slice: the table of docs/pods.md. Command: python -m benchmarks.pods.table"""
