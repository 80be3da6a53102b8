"""What the card games of env.py stand on: their pictures, exact arithmetic, exact players."""
