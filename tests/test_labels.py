"""Labels of every kind, in every selector and online loss, for the batch and for its references; and margins."""

import math

import numpy as np
import pytest
import torch

from losses import BatchAllTripletLoss, OnlineContrastiveLoss, OnlineTripletLoss
from utils import (
    AllPositivePairSelector,
    AllTripletSelector,
    BatchHardTripletSelector,
    FunctionNegativeTripletSelector,
    HardestNegativeTripletSelector,
    HardNegativePairSelector,
    RandomNegativeTripletSelector,
    SemihardNegativeTripletSelector,
    hardest_negative,
)

SELECTORS = {
    "all_pairs": lambda: AllPositivePairSelector(balance=False),
    "balanced_pairs": AllPositivePairSelector,
    "hard_pairs": HardNegativePairSelector,
    "all_triplets": AllTripletSelector,
    "batch_hard": BatchHardTripletSelector,
    "hardest": lambda: HardestNegativeTripletSelector(4.0),
    "random": lambda: RandomNegativeTripletSelector(4.0),
    "semihard": lambda: SemihardNegativeTripletSelector(4.0),
    "function": lambda: FunctionNegativeTripletSelector(4.0, hardest_negative),
}
WITH_MARGIN = {
    "hardest": HardestNegativeTripletSelector,
    "random": RandomNegativeTripletSelector,
    "semihard": SemihardNegativeTripletSelector,
    "function": lambda margin, **options: FunctionNegativeTripletSelector(margin, hardest_negative, **options),
}


def tensor_of(dtype, change=lambda label: label):
    return lambda labels: torch.tensor([change(label) for label in labels], dtype=torch.float64).to(dtype)


def name_of(label):
    return ("cat", "dog", "horse", "a long name, with a comma", "")[label % 5]


def series(labels):
    # The index is that of a frame whose rows have been shuffled.
    return pytest.importorskip("pandas").Series(labels, index=range(len(labels), 0, -1))


KINDS = {  # from small whole numbers
    "list": list,
    "tuple": tuple,
    "int64": tensor_of(torch.int64),
    "int32": tensor_of(torch.int32),
    "int16": tensor_of(torch.int16),
    "int8": tensor_of(torch.int8),
    "negative_int8": tensor_of(torch.int8, lambda label: label - 2),
    "negative_int64": lambda labels: torch.tensor([label - 2 for label in labels]),
    "uint8": tensor_of(torch.uint8),
    "uint16": lambda labels: torch.from_numpy(np.array(labels, dtype=np.uint16)),
    "uint32": lambda labels: torch.from_numpy(np.array(labels, dtype=np.uint32)),
    "uint64": lambda labels: torch.from_numpy(np.array(labels, dtype=np.uint64)),
    "huge": lambda labels: torch.tensor(labels) + 2**62,  # no float tells these apart
    "huge_uint64_array": lambda labels: np.array(labels, dtype=np.uint64) + np.uint64(2**63),
    "float32": tensor_of(torch.float32),
    "halves": tensor_of(torch.float32, lambda label: label / 2),
    "quarters_of_float64": tensor_of(torch.float64, lambda label: label / 4 - 0.5),
    "bfloat16": tensor_of(torch.bfloat16),
    "list_of_floats": lambda labels: [label / 2 for label in labels],
    "column": lambda labels: torch.tensor(labels)[:, None],
    "not_contiguous": lambda labels: torch.tensor(labels).repeat_interleave(2)[::2],
    "list_of_tensors": lambda labels: [torch.tensor(label) for label in labels],
    "array": np.array,
    "uint16_array": lambda labels: np.array(labels, dtype=np.uint16),
    "uint32_array": lambda labels: np.array(labels, dtype=np.uint32),
    "reversed_array": lambda labels: np.array(labels[::-1])[::-1],  # of negative stride
    "big_endian_array": lambda labels: np.array(labels, dtype=">i4"),
    "column_array": lambda labels: np.array(labels)[:, None],
    "object_array": lambda labels: np.array(labels, dtype=object),
    "strings": lambda labels: [name_of(label) for label in labels],
    "tuple_of_strings": lambda labels: tuple(name_of(label) for label in labels),
    "array_of_strings": lambda labels: np.array([name_of(label) for label in labels]),
    "column_of_strings": lambda labels: np.array([[name_of(label)] for label in labels]),
    "object_array_of_strings": lambda labels: np.array([name_of(label) for label in labels], dtype=object),
    "series": series,
    "series_of_strings": lambda labels: series([name_of(label) for label in labels]),
    "categories": lambda labels: series([name_of(label) for label in labels]).astype("category"),
}
TWO_KINDS = {  # of two classes alone
    "bool": lambda labels: torch.tensor(labels) % 2 == 1,
    "bool_list": lambda labels: [label % 2 == 1 for label in labels],
    "bool_array": lambda labels: np.array(labels) % 2 == 1,
}
MIXED = {  # of a batch, and of its references: classes are the same where their labels are equal
    "int64_uint8": (KINDS["int64"], KINDS["uint8"]),
    "int64_uint16": (KINDS["int64"], KINDS["uint16"]),
    "negative_int8_int64": (KINDS["negative_int8"], KINDS["negative_int64"]),
    "uint32_int16": (KINDS["uint32"], KINDS["int16"]),
    "list_tensor": (list, KINDS["int64"]),
    "array_tensor": (np.array, KINDS["int32"]),
    "float_int": (KINDS["float32"], KINDS["int64"]),
    "column_row": (KINDS["column"], KINDS["int64"]),
    "strings": (KINDS["strings"], KINDS["array_of_strings"]),
    "objects": (KINDS["array_of_strings"], KINDS["object_array_of_strings"]),
    "series_list": (KINDS["series_of_strings"], KINDS["strings"]),
    "tuple_series": (tuple, KINDS["series"]),
}

each_kind = pytest.mark.parametrize("convert", KINDS.values(), ids=KINDS)
each_kind_of_two = pytest.mark.parametrize("convert", TWO_KINDS.values(), ids=TWO_KINDS)
each_margin = pytest.mark.parametrize("make", WITH_MARGIN.values(), ids=WITH_MARGIN)

LABELS, REFERENCE_LABELS = [0, 1, 2, 0, 1, 2, 0, 3, 3], [3, 1, 1, 0, 2, 0, 4]


def loss_fns():
    return [
        OnlineContrastiveLoss(2.0, AllPositivePairSelector(balance=False)),
        OnlineContrastiveLoss(2.0, HardNegativePairSelector()),
        OnlineTripletLoss(4.0, HardestNegativeTripletSelector(4.0)),
        OnlineTripletLoss(4.0, AllTripletSelector()),
        OnlineTripletLoss(4.0, BatchHardTripletSelector()),
        BatchAllTripletLoss(4.0),
    ]


def select(selector, embeddings, labels, **references):
    """What a selector returns, as a list of lists of rows, with the same draws at every call."""
    torch.manual_seed(0)
    if hasattr(selector, "get_pairs"):
        return [sorted(pairs.tolist()) for pairs in selector.get_pairs(embeddings, labels, **references)]
    return [sorted(selector.get_triplets(embeddings, labels, **references).tolist())]


def values_of(embeddings, labels, **references):
    """Each loss, as a number."""
    results = [loss_fn(embeddings, labels, **references) for loss_fn in loss_fns()]
    return [float(result[0] if isinstance(result, tuple) else result) for result in results]


@each_kind
def test_selectors_take_labels_of_any_kind(convert):
    embeddings, reference = torch.randn(9, 2), torch.randn(7, 2)
    whole, reference_whole = torch.tensor(LABELS), torch.tensor(REFERENCE_LABELS)
    for make in SELECTORS.values():
        expected = select(make(), embeddings, whole)
        assert all(expected)
        assert select(make(), embeddings, convert(LABELS)) == expected
        expected = select(make(), embeddings, whole, reference=reference, reference_labels=reference_whole)
        assert all(expected)
        given = {"reference": reference, "reference_labels": convert(REFERENCE_LABELS)}
        assert select(make(), embeddings, convert(LABELS), **given) == expected


@each_kind
def test_losses_take_labels_of_any_kind(convert):
    embeddings, reference = torch.randn(9, 2), torch.randn(7, 2)
    assert values_of(embeddings, convert(LABELS)) == values_of(embeddings, torch.tensor(LABELS))
    given = {"reference": reference, "reference_target": convert(REFERENCE_LABELS)}
    expected = values_of(
        embeddings, torch.tensor(LABELS), reference=reference, reference_target=torch.tensor(REFERENCE_LABELS)
    )
    assert values_of(embeddings, convert(LABELS), **given) == expected


@each_kind_of_two
def test_labels_of_two_classes_may_be_bool(convert):
    embeddings, reference = torch.randn(9, 2), torch.randn(7, 2)
    labels, reference_labels = [label % 2 for label in LABELS], [label % 2 for label in REFERENCE_LABELS]
    assert values_of(embeddings, convert(LABELS)) == values_of(embeddings, labels)
    given = {"reference": reference, "reference_target": convert(REFERENCE_LABELS)}
    expected = values_of(embeddings, labels, reference=reference, reference_target=reference_labels)
    assert values_of(embeddings, convert(LABELS), **given) == expected
    for make in SELECTORS.values():
        given = {"reference": reference, "reference_labels": convert(REFERENCE_LABELS)}
        expected = select(make(), embeddings, labels, reference=reference, reference_labels=reference_labels)
        assert select(make(), embeddings, convert(LABELS), **given) == expected


@pytest.mark.parametrize(("convert", "convert_reference"), MIXED.values(), ids=MIXED)
def test_labels_of_batch_and_references_may_be_of_two_kinds(convert, convert_reference):
    embeddings, reference = torch.randn(9, 2), torch.randn(7, 2)
    for one, other in ((convert, convert_reference), (convert_reference, convert)):
        given = {"reference": reference, "reference_target": other(REFERENCE_LABELS)}
        expected = values_of(embeddings, LABELS, reference=reference, reference_target=REFERENCE_LABELS)
        assert values_of(embeddings, one(LABELS), **given) == expected
        for make in SELECTORS.values():
            expected = select(make(), embeddings, LABELS, reference=reference, reference_labels=REFERENCE_LABELS)
            given = {"reference": reference, "reference_labels": other(REFERENCE_LABELS)}
            assert select(make(), embeddings, one(LABELS), **given) == expected


def test_labels_that_no_float_tells_apart_are_of_other_classes():
    labels = torch.tensor([2**53, 2**53 + 1, 2**53, 2**53 + 1])
    _, negative = AllPositivePairSelector(balance=False).get_pairs(torch.randn(4, 2), labels)
    assert len(negative) == 4
    for given in (labels, labels.tolist(), labels.numpy()):
        _, count = BatchAllTripletLoss(100.0)(torch.randn(4, 2), given)
        assert count.item() == 8


def test_strings_are_no_numbers():
    # numpy would make one kind of both, and find "1" equal to 1.
    embeddings = torch.randn(3, 2)
    given = {"reference": embeddings, "reference_target": ["0", "1", "1"]}
    with pytest.raises((TypeError, ValueError), match=r"label|target"):
        BatchAllTripletLoss(1.0)(embeddings, [0, 1, 1], **given)
    with pytest.raises((TypeError, ValueError), match=r"label|target"):
        AllTripletSelector().get_triplets(
            embeddings, torch.tensor([0, 1, 1]), reference=embeddings, reference_labels=np.array(["0", "1", "1"])
        )


@pytest.mark.parametrize("make", SELECTORS.values(), ids=SELECTORS)
@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0.0, math.nan, 1.0, 0.0]),
        torch.tensor([0.0, math.nan, 1.0, 0.0], dtype=torch.bfloat16),
        np.array([0.0, math.nan, 1.0, 0.0]),
        [0.0, math.nan, 1.0, 0.0],
    ],
    ids=["tensor", "bfloat16", "array", "list"],
)
def test_labels_that_are_nan_are_refused(make, labels):
    embeddings, whole = torch.randn(4, 2), [0, 1, 1, 0]
    with pytest.raises(ValueError, match=r"(?i)nan"):
        select(make(), embeddings, labels)
    for one, other in ((labels, whole), (whole, labels)):
        with pytest.raises(ValueError, match=r"(?i)nan"):
            select(make(), embeddings, one, reference=embeddings, reference_labels=other)


@pytest.mark.parametrize("i", range(6))
def test_targets_that_are_nan_are_refused_by_losses(i):
    loss_fn, embeddings = loss_fns()[i], torch.randn(4, 2)
    labels, whole = torch.tensor([0.0, math.nan, 1.0, 0.0]), torch.tensor([0, 1, 1, 0])
    with pytest.raises(ValueError, match=r"(?i)nan"):
        loss_fn(embeddings, labels)
    for one, other in ((labels, whole), (whole, labels)):
        with pytest.raises(ValueError, match=r"(?i)nan"):
            loss_fn(embeddings, one, reference=embeddings, reference_target=other)


@each_margin
@pytest.mark.parametrize("margin", [-1.0, -1e-9, math.nan, math.inf, -math.inf])
def test_margins_of_selectors_are_finite_and_not_negative(make, margin):
    with pytest.raises(ValueError, match="margin"):
        make(margin)


@each_margin
@pytest.mark.parametrize("margin", [0, 0.0, 1, np.float32(0.5), 1e10])
def test_margins_may_be_zero_and_whole(make, margin):
    assert make(margin).margin == margin
