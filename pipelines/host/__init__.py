"""The host augmentation stage: it defines the recipe's pixels, on the CPU."""
