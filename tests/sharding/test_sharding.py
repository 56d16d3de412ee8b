"""Which elements a rank keeps, and parts that were cut one way and are read another; without processes."""

import json
import math
import os
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_callback.sharding import Piece, Ranks, Sharding
from merge_callback.sharding.pieces import split_rows
from merge_callback.snapshots.arena import Arena
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.safetensors_file import CorruptFileError, arena_header, write_file
from merge_callback.snapshots.shard_files import SHARDS, gather_shards, list_shards, shard_file, write_shard

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def boxes(draw):
    whole = draw(SHAPES)
    cuts = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in whole]
    offset, shape = [a for a, _ in cuts], [b - a for a, b in cuts]
    return Piece.box(whole, offset, shape), shape


@st.composite
def ranges(draw):
    whole = draw(SHAPES)
    count = math.prod(whole)
    start, stop = sorted(draw(st.tuples(st.integers(0, count), st.integers(0, count))))
    return Piece.flat(whole, start, stop), (start, stop)


@st.composite
def pieces(draw):
    piece, _ = draw(boxes() | ranges())
    if draw(st.booleans()):
        return piece
    start, stop = sorted(draw(st.tuples(st.integers(0, piece.rows), st.integers(0, piece.rows))))
    return piece.of_rows(start, stop)


def elements(piece):
    """The indices of a piece's elements in the flattened whole, one by one."""
    indices = torch.arange(math.prod(piece.whole)).view(piece.whole)
    return [i for box in piece.boxes for i in box.of(indices).flatten().tolist()]


@given(ranges())
def test_a_flat_piece_is_a_range_of_the_flattened_tensor(drawn):
    piece, (start, stop) = drawn
    assert elements(piece) == list(range(start, stop))
    assert piece.numel == stop - start
    assert piece.is_all == (stop - start == math.prod(piece.whole))


@given(boxes())
def test_a_box_is_a_slice_of_every_dimension(drawn):
    piece, shape = drawn
    assert piece.numel == math.prod(shape) == len(elements(piece))
    assert not piece.boxes or piece.boxes[0].shape == tuple(shape)


@given(st.data(), boxes() | ranges())
def test_rows_of_a_piece_are_slices_of_what_lies_in_memory(data, drawn):
    piece, shape = drawn
    start, stop = sorted(data.draw(st.tuples(st.integers(0, piece.rows), st.integers(0, piece.rows))))
    memory = torch.tensor(elements(piece), dtype=torch.int64)
    if piece.start is None and piece.boxes:
        memory = memory.view(shape)
    part = (memory if memory.ndim else memory.view(1))[start:stop]
    assert elements(piece.of_rows(start, stop)) == part.flatten().tolist()


@given(st.data(), pieces())
def test_a_span_says_where_every_element_lies(data, piece):
    start, stop = sorted(data.draw(st.tuples(st.integers(0, piece.numel), st.integers(0, piece.numel))))
    first, last, indices = piece.span(start, stop)
    found = range(first, last) if indices is None else (first + indices).tolist()
    assert list(found) == elements(piece)[start:stop]
    assert piece.bounds == ((min(elements(piece)), max(elements(piece)) + 1) if piece.numel else (0, 0))


@given(st.data(), pieces())
def test_elements_are_counted_up_to_any_index(data, piece):
    index = data.draw(st.integers(0, math.prod(piece.whole) + 1))
    assert piece.count_below(index) == sum(i < index for i in elements(piece))


@given(pieces())
def test_a_part_is_put_in_its_place_in_the_whole(piece):
    whole = torch.full(piece.whole, -1)
    piece.place(torch.tensor(elements(piece), dtype=torch.int64), whole)
    own = set(elements(piece))
    assert whole.flatten().tolist() == [i if i in own else -1 for i in range(whole.numel())]


SIZES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=6)


@given(SIZES, st.integers(1, 5))
def test_rows_are_split_in_order_and_none_is_left_out(sizes, parts):
    bounds = split_rows([(rows, rows * width) for rows, width in sizes], parts)
    owners = []
    for (rows, width), found in zip(sizes, bounds, strict=True):
        assert (found[0], found[-1], len(found)) == (0, rows, parts + 1)
        assert found == sorted(found)
        if width:  # of rows without bytes it does not matter who has them
            owners += [part for part in range(parts) for _ in range(found[part], found[part + 1])]
    assert owners == sorted(owners)


@given(SIZES, st.integers(1, 5))
def test_parts_differ_from_an_equal_share_by_less_than_a_row(sizes, parts):
    bounds = split_rows([(rows, rows * width) for rows, width in sizes], parts)
    shares = [
        sum((found[i + 1] - found[i]) * width for (_, width), found in zip(sizes, bounds, strict=True))
        for i in range(parts)
    ]
    # Each end of a part is rounded to the nearest end of a row.
    largest = max((width for rows, width in sizes if rows), default=0)
    assert all(abs(share - sum(shares) / parts) <= largest for share in shares)


# --- files cut one way, read another ------------------------------------------------------------------------

TENSORS = {
    "cube": torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1)),
    "narrow": torch.randn(7, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16),
    "counts": torch.arange(12).view(4, 3),
    "mask": torch.arange(10) % 3 == 0,
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "nothing": torch.zeros(0, 4),
}


def by_rows(shape, part, parts):
    """As replicas share a tensor out."""
    piece = Piece.all_of(shape)
    (bounds,) = split_rows([(piece.rows, piece.numel)], parts)
    return piece.of_rows(bounds[part], bounds[part + 1])


def by_range(shape, part, parts):
    """As FSDP1 cuts: anywhere."""
    count = math.prod(shape)
    return Piece.flat(shape, count * part // parts, count * (part + 1) // parts)


def by_box(dims, shape, part, parts):
    """As DTensor cuts, in chunks of the size that ``torch.chunk`` makes, along this dimension or the last."""
    if not shape:
        return Piece.all_of(shape) if part == parts - 1 else Piece((), ())
    dim = min(dims, len(shape) - 1)
    chunk = -(-shape[dim] // parts)
    offset, length = [0] * len(shape), list(shape)
    offset[dim] = min(chunk * part, shape[dim])
    length[dim] = min(chunk, shape[dim] - offset[dim])
    return Piece.box(shape, offset, length)


def by_grid(shape, part, parts):
    """Cut along two dimensions at once."""
    outer = by_box(0, shape, part // 2, parts // 2)
    if len(shape) < 2 or not outer.boxes:
        return outer if part % 2 == 0 else Piece(tuple(shape), ())
    (box,) = outer.boxes
    (inner,) = by_box(1, box.shape, part % 2, 2).boxes or [None]
    if inner is None:
        return Piece(tuple(shape), ())
    return Piece.box(shape, [a + b for a, b in zip(box.offset, inner.offset, strict=True)], inner.shape)


CUTS = {
    "whole": (lambda shape, part, parts: Piece.all_of(shape), 1),
    "rows": (by_rows, 3),
    "ranges": (by_range, 3),
    "first dimension": (lambda *given: by_box(0, *given), 2),
    "second dimension": (lambda *given: by_box(1, *given), 2),
    "grid": (by_grid, 4),
    "more parts than rows": (lambda *given: by_box(0, *given), 9),
}


def shares(cut):
    """What each rank keeps: pieces by name."""
    make, parts = CUTS[cut]
    return [
        {name: make(tuple(tensor.shape), part, parts) for name, tensor in TENSORS.items()}
        for part in range(parts)
    ]


def parts(kept):
    """The elements of each piece, laid end to end, as a rank has them in memory."""
    return {
        name: torch.cat(
            [box.of(TENSORS[name]).reshape(-1) for box in piece.boxes] or [TENSORS[name].new_empty(0)]
        )
        for name, piece in kept.items()
    }


def write(folder, cut):
    """Writes a snapshot shared out in this way; returns its path and checksum."""
    path, checksums = folder / "step=00000001-abc", []
    for rank, kept in enumerate(shares(cut)):
        layout = Layout.of(parts(kept))
        arena = Arena.empty(layout)
        arena.copy_from(parts(kept))
        if cut == "whole":
            whole = Arena.empty(Layout.of(TENSORS))
            whole.copy_from(TENSORS)
            file = folder / "step=00000001-abc.safetensors"
            return file, write_file(file, arena_header(whole.layout), [whole.buffer], {})
        sharding = Sharding({}, kept)
        sharding.ranks = Ranks()
        sharding.ranks.rank, sharding.ranks.size = rank, CUTS[cut][1]
        checksums.append(write_shard(path, sharding, layout, [arena.buffer], {"step": "1"}))
    return path, list_shards(path, checksums, write=True)


def read(path, checksum, kept):
    out = {name: torch.empty_like(part) for name, part in parts(kept).items()}
    gather_shards(path, checksum, kept, out)
    return out


@pytest.mark.parametrize("cut", CUTS)
def test_every_element_is_kept_by_one_rank(cut):
    for name, tensor in TENSORS.items():
        kept = sorted(i for share in shares(cut) for i in elements(share[name]))
        assert kept == list(range(tensor.numel())), name


@pytest.mark.parametrize(("old", "new"), list(product(CUTS, CUTS)))
def test_parts_are_read_from_files_cut_another_way(tmp_path, old, new):
    path, checksum = write(tmp_path, old)

    for kept in shares(new):
        found = read(path, checksum, kept)
        for name, part in parts(kept).items():
            assert torch.equal(found[name], part), name


@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed"])
def test_a_file_that_was_cut_or_lost_is_refused_by_name(tmp_path, damage):
    path, checksum = write(tmp_path, "rows")
    file = path / shard_file(1, 3)
    if damage == "removed":
        file.unlink()
    else:
        os.truncate(file, 0 if damage == "emptied" else file.stat().st_size - 1)

    with pytest.raises((CorruptFileError, OSError), match=file.name):
        read(path, checksum, shares("whole")[0])


def flip(file, place, bit=0):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("written"), "rows")


@settings(max_examples=200)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), in_header=st.booleans())
def test_a_flipped_bit_anywhere_is_refused(written, place, bit, in_header):
    path, checksum = written
    file = path / shard_file(1, 3)
    text = file.read_bytes()
    # Most of the header is padding; half of the examples flip what means something.
    flip(file, int(place * (len(text.split(b"    ")[0]) if in_header else len(text))), bit)

    try:
        with pytest.raises((CorruptFileError, OSError), match=path.name):
            read(path, checksum, shares("whole")[0])
    finally:
        file.write_bytes(text)


def test_what_a_rank_does_not_need_may_be_damaged(tmp_path):
    path, checksum = write(tmp_path, "rows")
    flip(path / shard_file(2, 3), -1)

    kept = {name: piece for name, piece in shares("rows")[0].items() if piece.numel}
    found = read(path, checksum, kept)

    assert torch.equal(found["cube"], parts(kept)["cube"])


@pytest.mark.parametrize("damage", ["flipped", "emptied", "removed"])
def test_a_list_that_is_not_the_one_written_is_refused_by_name(tmp_path, damage):
    path, checksum = write(tmp_path, "rows")
    if damage == "removed":
        (path / SHARDS).unlink()
    elif damage == "emptied":
        os.truncate(path / SHARDS, 0)
    else:
        flip(path / SHARDS, -9)

    with pytest.raises((CorruptFileError, OSError), match=SHARDS):
        read(path, checksum, shares("whole")[0])


def test_elements_that_no_file_holds_are_missed(tmp_path):
    path, _ = write(tmp_path, "rows")
    files = json.loads((path / SHARDS).read_text())["files"]

    checksum = list_shards(path, list(files.values())[:2], write=True)
    for rank in range(2):
        os.rename(path / shard_file(rank, 3), path / shard_file(rank, 2))

    with pytest.raises(CorruptFileError, match=r"holds \d+ of \d+ elements of"):
        read(path, checksum, shares("whole")[0])
