"""Holds schedules of the learning rate, one file each; warm-up is ``longctx.train.learning_rate``, the same for all."""
