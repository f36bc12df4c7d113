"""The tasks' rows: where they come from, and how they become prompts and completions."""
