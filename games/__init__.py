"""The games, and what belongs to them alone: pictures, exact arithmetic, experts, statistics."""
