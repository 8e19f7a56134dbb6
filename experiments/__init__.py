"""Whole studies: the paper's tables as lists of commands, baselines with code of their own, speed.

    ablate       tables of runs over seeds            bench       speed, side by side with timm
    crt          classifier re-training, arXiv 1910.09217
    deit3        DeiT-III's augmentation and loss, arXiv 2204.07118
    one_gpu      what to run first on a GPU           steps       launches and speed of a step
    minutes      what some minutes buy                resnet18    a plain CNN, for comparison
    fast_parts   what each part of FastNet adds       runs_table  runs as rows of results/runs.csv
"""
