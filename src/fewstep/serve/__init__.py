"""A service of pictures: the engine that batches evaluations, and the HTTP interface around it."""
