"""The comparison on a GPU: what `gpu_check` measures."""
