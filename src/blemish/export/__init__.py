"""Formats a trained detector can be written in, and the comparison that each passes first."""
