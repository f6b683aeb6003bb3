"""Somebody else's modules: found, changed to fused ones where they stand, explained."""
