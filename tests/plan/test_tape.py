"""What a tape keeps, and the peak of its backward pass."""

from __future__ import annotations

from vectorlm.plan.tape import Tape

N = 1000


def test_what_two_operations_keep_counts_once() -> None:
    tape = Tape()
    x = tape.tensor(N, needs_gradient=True)
    y = tape.run(N, [x], saves=[x])
    tape.run(N, [x, y], saves=[x, y])
    assert tape.saved_bytes() == 2 * N
    assert tape.saved_bytes(without=[x]) == N


def test_what_needs_no_gradient_keeps_nothing() -> None:
    tape = Tape()
    x = tape.tensor(N)
    y = tape.run(N, [x], saves=[x])
    assert tape.saved_bytes() == 0
    tape.run(N, [y], saves=[y], trains=True)
    assert tape.saved_bytes() == N


def test_gradients_live_from_their_maker_to_their_taker() -> None:
    """A chain: two gradients at a time, and what was saved goes as it is used."""
    tape = Tape()
    x = tape.tensor(N, needs_gradient=True)
    for _ in range(3):
        x = tape.run(N, [x], saves=[x])
    back = tape.backward(x)
    assert back.saved_bytes == 3 * N
    assert back.peak_bytes == 2 * N  # at its beginning, when all is still saved


def test_a_sum_passes_its_gradient_on() -> None:
    tape = Tape()
    x, y = (tape.tensor(N, needs_gradient=True) for _ in range(2))
    total = tape.run(N, [x, y], passes=True)
    assert tape.backward(total).peak_bytes == N


def test_scratch_counts_while_its_operation_runs() -> None:
    tape = Tape()
    x = tape.tensor(N, needs_gradient=True)
    y = tape.run(N, [x], saves=[x], scratch_bytes=5 * N)
    assert tape.backward(y).peak_bytes == 7 * N
