"""Tasks, chosen in YAML by `class_path`: what the student is asked, and what its answers are worth."""
