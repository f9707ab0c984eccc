"""Media in, film out: the engine that owns the model, and the stages that a job's frames pass."""
