"""Pixels and image files; nothing here knows the rest of the project.

    files         folders of image files: which there are, and of which class
    lists         the same from CSV files and lists of paths
    layout        which folders are for training, for testing, and classes
    holdout       which images are kept for testing
    copies        which files are the same image
    near_copies   which test images look nearly like a training image
    machine       how many CPUs and how much memory there are
    decode        image files decoded, checked, or streamed from disk
    operations    PIL's image operations for a batch of uint8 images, with an argument per image
    policies      AutoAugment, colour jitter, Cutout: which image gets which operation
    shapes        the built-in data set, drawn by code
"""
