"""engine/groups.py: head, mid and tail of a user's own classes."""
from types import SimpleNamespace

import pytest
import torch

from engine.datasets import load_data
from engine.groups import group_classes, groups_text
from engine.runtime import Runtime, UserError
from engine.settings import Parser, add_run_flags, resolve_data
from image_folders import picture


def sizes(counts, dataset="folder", limits=None):
    groups = group_classes(dataset, counts, limits)
    assert list(groups) == ["head", "mid", "tail"]
    assert sum(groups.values(), []) == list(range(len(counts)))
    return [len(classes) for classes in groups.values()]


@pytest.mark.parametrize("counts, expected", [
    ([500, 101, 100, 20, 19, 1], [2, 2, 2]),            # each by 100 and 20 a third: so they stay
    ([500, 400, 300, 20, 19, 19, 18, 2, 1, 1], [3, 4, 3]),      # mid would have a tenth
    ([900, 800, 700, 600, 500, 400], [2, 2, 2]),        # all of them above 100
    ([19, 18, 17, 9, 8, 7, 3, 2, 1], [3, 3, 3]),        # all of them below 20
    ([50, 30], [1, 0, 1]), ([50, 50], [0, 2, 0]), ([9, 8, 7], [1, 1, 1]),
    ([30] * 3 + [10] * 6, [3, 0, 6]),                   # a step
    ([90, 50, 50, 50, 50, 50, 30], [1, 5, 1]),          # the cuts next to K/3 and 2K/3 part equals
    ([60, 50, 50, 50, 40, 30], [1, 3, 2]), ([7] * 5, [0, 5, 0])])
def test_own_classes_are_grouped_by_rank_without_parting_equals(counts, expected):
    """All classes mid and no tail, as by 100 and 20; classes of equal count in two groups."""
    assert sizes(counts) == expected


def test_a_fifth_of_the_classes_is_enough_for_100_and_20():
    """More than 100 as head, 100 itself as mid; a group of less than a fifth that is kept."""
    counts = [101] * 8 + [100, 20] + [19] * 5                   # mid: 2 of 15
    assert sizes(counts) == [8, 2, 5]                           # where equals do not part either
    counts = [200 - k for k in range(12)] + [60, 50, 40] + [19 - k for k in range(3)]
    assert sizes(counts) == [6, 6, 6]                           # mid and tail: 3 of 18
    counts = counts[:9] + counts[12:]
    assert sizes(counts) == [9, 3, 3]                           # 3 of 15
    assert sizes(counts, limits="100,20") == sizes(counts)


def test_limits_are_those_that_were_given():
    """A class of exactly A or B images in the wrong group; a published split that is kept."""
    counts = [60, 50, 49, 10, 9, 1]
    assert sizes(counts, limits="50,10") == [1, 3, 2]
    assert sizes(counts, limits="1000,1000") == [0, 0, 6] and sizes(counts, limits="1,1")[0] == 5
    assert sizes([9] * 1000, "imagenet_lt") == [390, 445, 165]
    assert sizes(list(range(1010, 10, -1)), "imagenet_lt", "500,20") == [510, 481, 9]


def test_another_number_of_classes_has_no_published_split():
    """CIFAR-10's split of ten for six classes."""
    assert sizes([900, 800, 700, 600, 500, 400], "cifar10") == [2, 2, 2]


def test_the_limits_are_said():
    """Limits of the rule for the counts that there are; an empty group with a number."""
    counts = [900, 300, 280, 45, 38, 2]
    assert groups_text(counts, group_classes("folder", counts, "280,45")) == (
        "Classes by training images: head: 2 of 300 or more; mid: 2 of 45 to 280; tail: 2 of 38 or "
        "fewer.")
    assert "mid: none; tail: 1 of 3" in groups_text([5, 3], group_classes("folder", [5, 3]))


def test_the_flag_reaches_the_data(tmp_path):
    """Groups of the data that were read before; a flag for the published sets, or one that is not
    understood, without a word."""
    for k, name in enumerate(("a", "b", "c", "d")):
        for split, n in (("train", 6 - k), ("test", 1)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                picture(seed=10 * k + i + 100 * n).save(tmp_path / split / name / f"{i}.png")
    args = SimpleNamespace(dataset="folder", data_dir=str(tmp_path), imb=None, imb_type="exp",
                           img_size=32, holdout=None, train_list=None, test_list=None,
                           skip_bad=False, holdout_by=None, list_columns=None)
    rt = Runtime(torch.device("cpu"))
    assert [len(g) for g in load_data(args, rt).groups.values()] == [1, 2, 1]
    args.groups = "4,4"
    assert [len(g) for g in load_data(args, rt).groups.values()] == [2, 1, 1]
    args.groups = None
    assert [len(g) for g in load_data(args, rt).groups.values()] == [1, 2, 1]
    parser = Parser("")
    add_run_flags(parser)
    with pytest.raises(UserError, match="--groups is for your own data"):
        resolve_data(parser.parse_args(["--dataset", "shapes", "--groups", "20,5"]))
    for text in ("20", "5,20", "a,b", "20,0", "20,5,1", "1.5,1"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--groups", text])
