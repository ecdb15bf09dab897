"""Tasks: sets of prompts with answers. Import the file you need; `seqio_tasks` alone loads TensorFlow."""
