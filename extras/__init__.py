"""What a flag calls: pages of games, endpoints, TensorBoard."""
