"""The student network: layers, fused kernels and the choice among them, weights from files."""
