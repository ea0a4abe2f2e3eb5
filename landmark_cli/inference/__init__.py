"""Reading inputs of any length through a model, and generating text after what was read."""
