"""Which rows make a step: each once, the same whatever the accumulation and the number of processes, little padding."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.train.batches import LengthGroupedBatches, Rows, Share, SortedBatches, collate, pieces
from gemma_tune.train.loss import IGNORE_INDEX

many_lengths = st.lists(st.integers(1, 90), min_size=1, max_size=260)
shares = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
relaxed = settings(max_examples=80, deadline=None)


def of_all(sampler: type, lengths, batch: int, accumulation: int, processes: int, **how) -> list[list[list[int]]]:
    """The batches of each process."""
    return [list(sampler(lengths, Share(batch, accumulation, processes, rank), **how)) for rank in range(processes)]


def row_sets(batches: list[list[list[int]]], accumulation: int) -> list[set[int]]:
    """The rows of each step, of all processes together."""
    steps = []
    iterators = [iter(own) for own in batches]
    while any(parts := [list(islice(own, accumulation)) for own in iterators]):
        steps.append({row for part in parts for batch in part for row in batch})
    return steps


@relaxed
@given(many_lengths, shares, st.integers(0, 3), st.integers(0, 2))
def test_an_epoch_has_every_row_once(lengths, share, seed, epoch):
    batches = []
    for rank in range(share[2]):
        sampler = LengthGroupedBatches(lengths, Share(*share, rank), seed)
        sampler.set_epoch(epoch)
        batches.append(list(sampler))
        assert len(batches[-1]) == len(sampler)
    assert sorted(row for own in batches for batch in own for row in batch) == list(range(len(lengths)))
    assert len({len(own) for own in batches}) == 1, "a process without a turn would wait for the others forever"
    assert max(len(batch) for own in batches for batch in own) <= share[0]
    assert len(row_sets(batches, share[1])) == -(-len(lengths) // (share[0] * share[1] * share[2]))


@relaxed
@given(many_lengths, shares)
def test_a_step_learns_from_the_same_rows_with_accumulation_and_with_processes(lengths, share):
    batch, accumulation, processes = share
    one = row_sets(of_all(LengthGroupedBatches, lengths, batch, accumulation * processes, 1, seed=1), accumulation * processes)
    several = row_sets(of_all(LengthGroupedBatches, lengths, *share, seed=1), accumulation)
    large = row_sets(of_all(LengthGroupedBatches, lengths, batch * accumulation * processes, 1, 1, seed=1), 1)
    assert one == several == large


@relaxed
@given(many_lengths, shares, st.integers(0, 3))
def test_the_first_step_has_the_longest_row(lengths, share, seed):
    [first, *_] = row_sets(of_all(LengthGroupedBatches, lengths, *share, seed=seed), share[1])
    assert max(lengths[row] for row in first) == max(lengths)


def test_the_longest_row_comes_first_also_where_it_is_left_over():
    """A step of 4 and 50 steps to a group: the 201st row of the random order would make a group of its own."""
    for longest in range(201):
        lengths = np.full(201, 7)
        lengths[longest] = 99
        first = next(iter(LengthGroupedBatches(lengths, Share(4), seed=0)))
        assert longest in first and len(first) == 4


@relaxed
@given(many_lengths, shares)
def test_evaluation_has_every_row_once_and_the_longest_first(lengths, share):
    batch, _, processes = share
    batches = of_all(SortedBatches, lengths, batch, 1, processes)
    assert {len(own) for own in batches} == {len(SortedBatches(lengths, Share(batch, 1, processes)))}
    assert sorted(row for own in batches for part in own for row in part) == list(range(len(lengths)))
    longest = [max(lengths[row] for own in batches for row in own[n]) for n in range(len(batches[0]))]
    assert longest == sorted(longest, reverse=True)


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(5, 300, 500)

    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = LengthGroupedBatches(lengths, Share(4, 2), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(5)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = order(1, 0)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()
    torch.manual_seed(6)
    assert order(1, 0) == first
    others = [order(2, 0), order(1, 1), order(2, 1), order(0, 0)]
    assert all(other != first for other in others)
    sets = [{frozenset(rows) for rows in each} for each in [first, *others]]
    assert all(len(a & b) < 20 for n, a in enumerate(sets) for b in sets[:n]), "other rows together, not only another order"
    # A seed's second epoch is not another seed's first one.
    assert order(1, 1) != order(2, 0)


def test_rows_of_the_same_length_stay_in_the_order_of_chance():
    """Else which of them go together would depend on how a machine sorts."""
    lengths = np.arange(200) % 3  # one group
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    order.sort(key=lambda row: -lengths[row])
    steps = LengthGroupedBatches(lengths, Share(4), seed=0).steps()
    assert {tuple(step.tolist()) for step in steps} == {tuple(order[n:n + 4]) for n in range(0, 200, 4)}


def padding(lengths: np.ndarray, batches: list[list[int]]) -> float:
    """Share of the positions that are padding."""
    return 1 - lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in batches)


def test_little_of_a_batch_is_padding():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5.0, 0.8, 3000), 10, 2048).astype(int)
    at_random = [list(rows) for rows in generator.permutation(3000).reshape(-1, 4)]
    grouped = LengthGroupedBatches(lengths, Share(4), seed=0)
    assert padding(lengths, at_random) > 0.35
    assert padding(lengths, list(grouped)) < 0.05
    means = [lengths[batch].mean() for batch in grouped]
    rising = np.mean(np.diff(means) > 0)
    assert 0.4 < rising < 0.6, "lengths must not run in one direction over the epoch"


def test_the_processes_get_similar_lengths():
    lengths = np.random.default_rng(0).integers(5, 300, 800)
    tokens = [sum(lengths[row] for batch in own for row in batch)
              for own in of_all(LengthGroupedBatches, lengths, 4, 2, 2, seed=0)]
    assert max(tokens) / min(tokens) < 1.03


def test_a_million_rows_are_kept_as_numbers():
    lengths = np.random.default_rng(0).integers(5, 300, 1_000_000)
    sampler = LengthGroupedBatches(lengths, Share(4, 8), seed=0)
    assert sampler.lengths is lengths
    steps = sampler.steps()
    assert {type(step) for step in steps} == {np.ndarray}
    # Views of a few arrays, not one allocation per step.
    assert len({id(step.base) for step in steps}) == -(-len(steps) // 50)
    assert sum(map(len, steps)) == len(lengths) and len(steps) == 31_250


# ---- tensors ---------------------------------------------------------------------------------------------------------

def row(length: int, first: int = 1) -> dict[str, list[int]]:
    ids = list(range(first, first + length))
    return {"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]]}


def test_rows_are_padded_on_the_right():
    batch = collate([row(2), row(4, 10), row(1, 20)])
    assert batch["input_ids"].tolist() == [[1, 2, 0, 0], [10, 11, 12, 13], [20, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, 11, 12, 13], [-100] * 4]
    assert batch["lengths"].tolist() == [2, 4, 1]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_process_without_rows_gets_one_token_that_is_not_trained():
    batch = collate(Rows([row(3)]).__getitems__([]))
    assert batch["input_ids"].shape == (1, 1) and batch["labels"].tolist() == [[IGNORE_INDEX]]
    assert batch["lengths"].tolist() == [0]
    [piece] = pieces(batch, 4)
    assert piece["input_ids"].shape == (1, 1)


def test_a_data_loader_takes_empty_batches():
    from torch.utils.data import DataLoader

    data = Rows([row(n + 1) for n in range(5)])
    batches = LengthGroupedBatches([len(data.dataset[n]["input_ids"]) for n in range(5)], Share(2, 2, 2, 1), seed=0)
    sizes = [batch["lengths"].tolist() for batch in DataLoader(data, batch_sampler=batches, collate_fn=collate)]
    assert len(sizes) == len(batches) == 2
    assert sizes[1] == [0]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_pieces_are_the_batch_without_their_own_padding(count):
    batch = collate([row(n, 10 * n) for n in (3, 7, 5, 1, 2, 2, 6)])
    parts = list(pieces(batch, count))
    assert [len(p["lengths"]) for p in parts] == [count] * (7 // count) + [7 % count] * (7 % count > 0)
    assert torch.cat([p["lengths"] for p in parts]).tolist() == batch["lengths"].tolist()
    n = 0
    for part in parts:
        assert part["input_ids"].shape == part["labels"].shape == (len(part["lengths"]), part["lengths"].max())
        for ids, labels in zip(part["input_ids"], part["labels"]):
            width = len(ids)
            assert torch.equal(ids, batch["input_ids"][n, :width]) and torch.equal(labels, batch["labels"][n, :width])
            assert not (batch["labels"][n, width:] != IGNORE_INDEX).any()
            n += 1
