"""Judging variants: the quality of their pictures, and what they cost."""
