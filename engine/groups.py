"""Which classes are head, mid and tail: as published, or by their training images."""
import data_lt

GROUPS = ("head", "mid", "tail")


def group_classes(dataset, counts, limits=None):
    """{"head": [class numbers], "mid": ..., "tail": ...} of classes in descending count.

    limits "A,B", as --groups: head has more than A training images, tail fewer than B. Without them
    the published split where `dataset` has one for this many classes; else by 100 and 20 images,
    as is usual, if each group then gets a fifth of the classes at least; else thirds of the
    classes.
    """
    if limits:
        return split_by_count(counts, *map(int, limits.split(",")))
    if sum(data_lt.PUBLISHED_GROUPS.get(dataset, ())) == len(counts):
        return data_lt.published_groups(dataset)
    usual = split_by_count(counts, 100, 20)
    if 5 * min(map(len, usual.values())) >= len(counts):
        return usual
    return split_in_thirds(counts)


def split_by_count(counts, above, below):
    """head: classes of more than `above` training images, tail: of fewer than `below`."""
    first, last = sum(n > above for n in counts), sum(n >= below for n in counts)
    return split_at(len(counts), first, last)


def split_in_thirds(counts):
    """As near to a third of the classes each as can be without parting classes of equal count.

    Of two different counts: head and tail. Of one: all are mid.
    """
    K = len(counts)
    cuts = [k for k in range(1, K) if counts[k - 1] != counts[k]]       # between unequal counts
    if not cuts:
        return split_at(K, 0, K)
    if len(cuts) == 1:
        return split_at(K, cuts[0], cuts[0])
    last = nearest(cuts[1:], 2 * K / 3)
    return split_at(K, nearest([cut for cut in cuts if cut < last], K / 3), last)


def nearest(cuts, wanted):
    return min(cuts, key=lambda cut: abs(cut - wanted))


def split_at(num_classes, first, last):
    """Groups of the classes before `first`, from there to before `last`, and from there on."""
    classes = list(range(num_classes))
    return dict(zip(GROUPS, (classes[:first], classes[first:last], classes[last:])))


def groups_text(counts, groups):
    """head: 8 classes of 300 or more training images; mid: 7 of 45 to 280; tail: 8 of 38 or fewer.
    """
    parts = []
    for name, classes in groups.items():
        if not classes:
            parts.append(f"{name}: none")
            continue
        most, least = counts[classes[0]], counts[classes[-1]]
        images = {"head": f"{least} or more", "mid": f"{least} to {most}",
                  "tail": f"{most} or fewer"}
        parts.append(f"{name}: {len(classes)} of {images[name]}")
    return f"Classes by training images: {'; '.join(parts)}."
