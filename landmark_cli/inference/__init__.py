"""Reading inputs of any length through a model, and what sits on that: generation."""
