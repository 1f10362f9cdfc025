"""Follow a model call by call: record its gates, replay it, and the table of operations that are followed exactly."""
