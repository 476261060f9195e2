"""The model as a list of layers: what each owns, costs and computes; how the list is cut into stages."""
