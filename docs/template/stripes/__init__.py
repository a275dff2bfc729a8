"""Beside GRN: images of stripes, a convolutional refiner, a quadratic schedule, a score that counts stripes."""
