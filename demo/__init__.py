"""The toy world: generator, oracle, trainer and the committed weights."""
