"""Shared by all tests: the project on the path, one thread, a tiny CIFAR-like folder of images."""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")     # before CUDA is used; one_gpu sets its GPU
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                            # the networks are too small for more
pytest.register_assert_rewrite("tiny_runs", "several_processes")     # helpers in tests/runs/


def script(module, monkeypatch, *flags):
    """Run a script's main in this process, as `python module.py flags` would."""
    from engine import runtime
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    runtime.run_main(module.main)


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    # First, since torch.export pretends a GPU, for which the next backward pass starts threads: no
    # forked process of this one could make one from then on.
    items.sort(key=lambda item: item.name != "test_a_small_version")


@pytest.fixture(scope="module")
def no_pictures():
    """Students end without a picture, which takes longer to draw than they take to train."""
    import train_student
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_student, "draw_summary", lambda folder: None)
        yield


@pytest.fixture(scope="session")
def tiny_cifar(tmp_path_factory):
    """10 classes of 32 px images, 24 to train and 6 to test on each: noisy planes of one color."""
    root, rng = tmp_path_factory.mktemp("tiny"), np.random.RandomState(0)
    colors = [(r, g, b) for r in (40, 200) for g in (40, 200) for b in (40, 200)]
    colors += [(120, 40, 120), (200, 120, 40)]
    for split, n in (("train", 24), ("test", 6)):
        for k, color in enumerate(colors):
            folder = root / split / f"class{k}"
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = np.array(color) + rng.randint(-30, 31, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def learned_by_heart(tiny_cifar, tmp_path_factory):
    """Run folder of a plain ViT, trained on tiny_cifar without augmentation."""
    import train_student
    folder = tmp_path_factory.mktemp("by_heart") / "vit"
    flags = ("--recipe cpu --imb 1 --method vit --model micro --img-size 16 --epochs 8 "
             "--warmup-epochs 1 --drw-epoch 0 --lr 2e-3 --batch 24 --eval-every 8 --rand-ops 0 "
             "--erasing 0").split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_student, "draw_summary", lambda folder: None)
        script(train_student, patch, "--data-dir", tiny_cifar, "--out", folder, *flags)
    return folder
