"""Joined methods: two or more that look at the same image, as one detector, one graph and one file.

Each part is trained as it is alone. Methods fail on different parts, so their z-scores, summed, tell more
defects apart than any of them (docs/accuracy.md, "Joined methods"). The part scores and maps are brought to
one scale by good images that they were not learned from, or that were scored without themselves.
"""
