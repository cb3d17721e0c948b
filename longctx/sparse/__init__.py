"""Sparse softmax attention as mixers: MoBA and RAT, and the exchange of rows that both need."""
