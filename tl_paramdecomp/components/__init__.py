"""Components, masks and decompositions: the maths of a sum of components, without host, data or optimiser."""
