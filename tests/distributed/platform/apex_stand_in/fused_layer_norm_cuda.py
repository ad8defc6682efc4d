"""Its being there says that the kernels were built."""
