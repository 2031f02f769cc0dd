"""TPU kernels, one folder per operation, each beside its plain reference."""
