"""The averaged copy of a model: its tensors, its updates, its loan to the model, its state."""
