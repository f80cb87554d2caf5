"""Margin-softmax heads, fused: no logits in memory, gradients that are right."""
