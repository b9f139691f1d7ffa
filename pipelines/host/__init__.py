"""The host augmentation stage: the definition of the recipe's pixels, on the CPU."""
