"""The policy at θ: its log-probs and entropies, its language head, a virtual step on its weights."""
