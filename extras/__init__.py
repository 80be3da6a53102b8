"""What a flag calls: pages and films of games, endpoints, TensorBoard."""
