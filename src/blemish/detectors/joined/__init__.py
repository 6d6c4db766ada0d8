"""Joined methods: two or more that look at the same image, as one detector, one graph and one file.

Each part is trained as it is alone. Methods fail on different parts, so that the mean of their maps, each on
a scale that good images set, tells more defects apart than any of them (docs/accuracy.md, "Joined methods").
"""
