"""The method of the paper (arXiv 2405.15549) as tensor operations and modules; it knows torch alone."""
