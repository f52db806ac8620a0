"""Speed comparisons: random checkpoints of true shapes, PyTorch baselines, the runtime, and reports made from JSON."""
