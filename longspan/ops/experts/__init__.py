"""Feed-forward layers of which each token takes a few of many: tokens in order of their experts, and products of a matrix for each.

`grouped` multiplies runs of rows, `dispatch` makes runs of tokens and puts them back, `swiglu` is the layer itself.
"""
