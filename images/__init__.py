"""Pixels and image files; nothing here knows the rest of the project.

    files         folders and lists of image files: find, check, decode, or stream them from disk
    operations    PIL's image operations for a batch of uint8 images, with an argument per image
    policies      AutoAugment, colour jitter, Cutout: which image gets which operation
    shapes        the built-in data set, drawn by code
"""
