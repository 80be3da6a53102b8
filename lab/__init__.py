"""What is run by itself: making pocket models, measuring, breaking things."""
