"""Modules, each one fused operator inside: dense block, transition, stem; the networks made of them."""
