"""What policy.py stands on: models found and loaded, what differs between them, their memory, LoRA."""
