"""What env.py and alfworld_env.py stand on: pictures, exact arithmetic, exact players; houses, who knows their way."""
