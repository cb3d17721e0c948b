"""One file per planner: who computes which rows of attention."""
