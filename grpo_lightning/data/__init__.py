"""Data: where prompts come from."""
