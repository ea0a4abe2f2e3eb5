"""Training: one loop on accelerate for every model, its optimizer, its checkpoints and what it measures."""
