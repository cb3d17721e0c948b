"""One file per strategy of softmax attention, each readable as its paper's pseudocode."""
