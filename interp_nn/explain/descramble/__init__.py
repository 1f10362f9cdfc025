"""Descrambling: the orthogonal transform that makes a layer's signals smooth, in closed form."""
