"""The tensor pool: buffers are used again, and never while anything still needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sickbay.reference.training.pool import Pool, StillNeeded


def test_a_buffer_that_came_back_is_lent_again_in_another_shape_and_dtype() -> None:
    pool = Pool()
    with pool.borrow((2, 6)) as first:
        first.fill_(7)
        place = first.data_ptr()
    with pool.borrow((3, 2), torch.float64) as second:
        assert second.data_ptr() == place
        assert (second.shape, second.dtype, second.is_contiguous()) == ((3, 2), torch.float64, True)
    assert (pool.statistics.loans, pool.statistics.reused, pool.statistics.free_bytes) == (2, 1, 48)


def test_two_loans_at_once_have_memory_of_their_own() -> None:
    pool = Pool()
    with pool.borrow((4,)) as one, pool.borrow((4,)) as other:
        one.fill_(1)
        other.fill_(2)
        assert one.tolist() == [1] * 4
    assert pool.statistics.peak_lent_bytes == 32


def test_a_name_that_outlives_the_loan_holds_nothing() -> None:
    pool = Pool()
    with pool.borrow((4,)) as early:
        early.fill_(1)
    with pool.borrow((4,)) as late:
        late.fill_(2)
        assert early.numel() == 0


WEIGHT = torch.ones(3, 3, requires_grad=True)
HOLDERS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "graph": (lambda lent: lent @ WEIGHT, "saved by a graph"),
    "view": (lambda lent: lent[0], "alias"),
    "transposed": (lambda lent: lent.T, "alias"),
    "detached": (lambda lent: lent.detach(), "alias"),
    "numpy": (lambda lent: lent.numpy(), "alias"),
    "parameter": (lambda lent: torch.nn.Parameter(lent), "alias"),
    "in a graph": (lambda lent: lent.copy_(WEIGHT), "requires_grad"),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_what_is_still_needed_is_refused_keeps_its_values_and_is_never_lent_again(name: str) -> None:
    use, said = HOLDERS[name]
    pool = Pool()
    with pytest.raises(StillNeeded, match=rf"\(3, 3\) float32 tensor .*{said}.*clone\(\)"), pool.borrow((3, 3)) as lent:
        lent.fill_(5)
        held = use(lent)
    place = lent.data_ptr()
    assert lent.shape == (3, 3)
    before = lent.detach().clone()
    with pool.borrow((3, 3)) as other:
        other.fill_(-1)
        assert other.data_ptr() != place
    assert torch.equal(lent.detach(), before)
    assert (pool.statistics.kept, pool.statistics.reused) == (1, 0)
    assert held is not None


def test_what_a_graph_no_longer_needs_comes_back() -> None:
    pool = Pool()
    for _ in range(2):
        with pool.borrow((3, 3)) as lent:
            lent.fill_(2)
            (lent @ WEIGHT).sum().backward()
            row = lent[0]
            del row
    assert (pool.statistics.reused, pool.statistics.kept) == (1, 0)


def test_without_gradients_products_leave_nothing_behind() -> None:
    pool = Pool()
    for context in (torch.no_grad, torch.inference_mode):
        with context(), pool.borrow((3, 3)) as lent:
            torch.mm(WEIGHT, WEIGHT, out=lent)
            assert lent.sum() == 27
    assert pool.statistics.reused == 1


def test_an_error_inside_passes_through_and_the_buffer_comes_back() -> None:
    pool = Pool()
    with pytest.raises(ZeroDivisionError), pool.borrow((4,)):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), pool.borrow((4,)) as lent:
        view = lent[1:]
        raise ZeroDivisionError
    assert (pool.statistics.reused, pool.statistics.kept, view.numel()) == (1, 1, 3)


def test_it_holds_no_more_than_its_bound_and_the_longest_unused_goes_first() -> None:
    pool = Pool(most_bytes=100)
    with pool.borrow((10,)) as a, pool.borrow((15,)) as b:
        places = a.data_ptr(), b.data_ptr()
    assert pool.statistics.free_bytes == 100
    with pool.borrow((1,)) as tiny:  # neither fits: both are far too large for it
        assert tiny.data_ptr() not in places
    assert pool.statistics.free_bytes == 44  # b came back first, so b went
    with pool.borrow((26,)):
        pass
    assert pool.statistics.free_bytes == 44
    pool.clear()
    assert pool.statistics.free_bytes == 0
    with pytest.raises(ValueError, match="most_bytes is -1; it must be at least 0"):
        Pool(-1)


def test_threads_never_share_a_buffer() -> None:
    pool, wrong = Pool(), []

    def work(number: int) -> None:
        for _ in range(200):
            with pool.borrow((64,), torch.int64) as lent:
                lent.fill_(number)
                if not bool((lent == number).all()):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.statistics.loans == 800
    assert pool.statistics.reused >= 796


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([torch.float32, torch.int64, torch.bool])), max_size=30), st.integers(0, 400))
def test_any_order_of_loans_keeps_the_books(wishes: list[tuple[int, torch.dtype]], most: int) -> None:
    pool = Pool(most_bytes=most)
    for size, dtype in wishes:
        with pool.borrow((size,), dtype) as lent:
            lent.fill_(1)
            assert lent.shape == (size,)
            assert lent.sum() == size
        assert pool.statistics.free_bytes <= most
    assert pool.statistics.loans == len(wishes)
    assert pool.statistics.kept == 0
