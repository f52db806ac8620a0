"""BLoRA (arXiv 2510.18723): LoRA with a Gaussian posterior over its matrices, against forgetting."""
