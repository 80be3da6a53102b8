"""ALFWorld, the paper's second world: its game, engine, houses, pictures and expert."""
