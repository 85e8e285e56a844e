"""Scored entries of rows: shared sources, padding, meshes, gradients made in the forward pass."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import (
    Layout,
    checks,
    extras,
    reference,
    scored_logprobs,
    scored_loss,
    token_logprobs,
    token_loss,
)
from codjax_kernels.selection import select
from codjax_kernels.xla import logprobs as xla
from jax.sharding import AxisType

ROWS, TOKENS, WIDTH, VOCAB, ENTRIES = 4, 6, 8, 16, 10


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(xla, "SINGLE_CHUNK_LOGITS", 0)
    monkeypatch.setattr(extras, "CHUNK", 3)


def problem(seed=0):
    """Rows whose entries share sources (10 entries over 6 tokens), a third of them padding."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32)
    table = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    source = rng.integers(0, TOKENS, (ROWS, ENTRIES)).astype(np.int32)
    target = rng.integers(0, VOCAB, (ROWS, ENTRIES)).astype(np.int32)
    is_valid = rng.random((ROWS, ENTRIES)) > 0.3
    bars = rng.normal(size=(2, ROWS, ENTRIES)).astype(np.float32)
    return hidden, table, source, target, is_valid, bars


def plain(hidden, table, source, target, temperature=1.0):
    """Every entry alone, whole logits."""
    gathered = jnp.take_along_axis(jnp.asarray(hidden), source[:, :, None], axis=1)
    logprobs, entropy = reference.token_logprobs(
        gathered.reshape(-1, WIDTH),
        jnp.asarray(table),
        jnp.asarray(target).reshape(-1),
        temperature,
    )
    return logprobs.reshape(source.shape), entropy.reshape(source.shape)


def weighted(function, bars, is_valid):
    """Value and gradient of the sum of what `function` gives, weighted, with its results."""

    def total(hidden, table):
        logprobs, entropy = function(hidden, table)
        logprobs, entropy = (jnp.where(is_valid, x, 0.0) for x in (logprobs, entropy))
        return jnp.sum(bars[0] * logprobs) + jnp.sum(bars[1] * entropy), (logprobs, entropy)

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


def assert_same(got, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        largest = max(1.0, float(jnp.max(jnp.abs(other))))
        np.testing.assert_allclose(one, other, atol=tolerance * largest)


class TestSelect:
    def test_by_hand(self):
        source = jnp.array([7, 2, 9, 7, 2, 2])
        found = select(source, jnp.array([True, True, False, True, True, True]), num_sources=10)
        assert int(found.num_slots) == 2
        assert found.slot_source[:2].tolist() == [2, 7]
        assert found.slot_entry[:2].tolist() == [1, 0]
        assert found.entry_slot.tolist() == [1, 0, 0, 1, 0, 0]
        assert found.is_main.tolist() == [True, True, False, False, False, False]
        assert int(found.num_extra) == 3
        assert found.extra_entry[:3].tolist() == [4, 5, 3]

    def test_nothing_valid(self):
        found = select(jnp.array([3, 3]), jnp.array([False, False]), num_sources=10)
        assert int(found.num_slots) == int(found.num_extra) == 0

    def test_no_more_slots_than_hidden_states(self):
        found = select(jnp.array([1, 0, 1, 1, 0]), jnp.ones(5, bool), num_sources=2)
        assert found.slot_source.tolist() == [0, 1]
        assert found.slot_entry.tolist() == [1, 0]
        assert int(found.num_extra) == 3


@pytest.mark.parametrize("chunk_size", [3, 64])
@pytest.mark.parametrize("seed", range(3))
def test_shared_sources_give_what_entries_alone_give(seed, chunk_size):
    hidden, table, source, target, is_valid, bars = problem(seed)
    scored = functools.partial(
        scored_logprobs,
        source=source,
        target=target,
        is_valid=is_valid,
        temperature=0.7,
        chunk_size=chunk_size,
    )
    alone = functools.partial(plain, source=source, target=target, temperature=0.7)
    got = weighted(scored, bars, is_valid)(hidden, table)
    assert_same(got, weighted(alone, bars, is_valid)(hidden, table))


def test_results_of_padding_are_zero():
    hidden, table, source, target, is_valid, _ = problem()
    logprobs, entropy = scored_logprobs(
        hidden, table, source=source, target=target, is_valid=is_valid
    )
    assert not np.any(np.asarray(logprobs)[~is_valid])
    assert not np.any(np.asarray(entropy)[~is_valid])
    assert np.all(np.asarray(logprobs)[is_valid] < 0)


def test_a_source_outside_of_the_row_is_padding():
    hidden, table, source, target, _, _ = problem()
    source[0, 0], source[1, 1] = -1, TOKENS
    logprobs, _ = scored_logprobs(hidden, table, source=source, target=target)
    assert logprobs[0, 0] == logprobs[1, 1] == 0
    assert float(logprobs[1, 0]) < 0


def test_several_targets_cost_one_projection():
    hidden, table, _, _, _, _ = problem()
    states = hidden.reshape(-1, WIDTH)
    targets = np.random.default_rng(5).integers(0, VOCAB, (len(states), 4)).astype(np.int32)
    logprobs, entropy = token_logprobs(states, table, targets, 0.5)
    for column in range(4):
        expected = reference.token_logprobs(
            jnp.asarray(states), jnp.asarray(table), jnp.asarray(targets[:, column]), 0.5
        )
        assert_same((logprobs[:, column], entropy), expected)
    counted = jax.jit(token_logprobs).lower(states, table, targets).compile().as_text()
    logits = re.findall(rf"f32\[\d+,{VOCAB}\]\S* dot\(", counted)
    assert len(logits) == 1, logits


@pytest.mark.parametrize("num_valid", [0, 1, 5, 7, 24])
def test_only_valid_entries_count_whatever_the_others_hold(num_valid):
    hidden, table, _, _, _, _ = problem()
    states = hidden.reshape(-1, WIDTH)
    targets = np.arange(len(states), dtype=np.int32) % VOCAB
    poisoned = states.copy()
    poisoned[num_valid:] = np.nan

    def total(states, table, num_valid):
        logprobs, entropy = token_logprobs(
            states, table, targets, num_valid=num_valid, chunk_size=4
        )
        return jnp.sum(logprobs) + jnp.sum(entropy), logprobs

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (value, logprobs), gradients = run(poisoned, table, num_valid)
    assert not np.any(np.asarray(logprobs)[num_valid:])
    assert not np.any(np.asarray(gradients[0])[num_valid:])
    if num_valid:
        whole = jax.value_and_grad(
            lambda s, t: jnp.sum(
                jnp.stack(reference.token_logprobs(s, t, jnp.asarray(targets[:num_valid])))
            ),
            (0, 1),
        )(jnp.asarray(states[:num_valid]), jnp.asarray(table))
        assert_same((value, gradients[1]), (whole[0], whole[1][1]))
    else:
        assert not np.any(np.asarray(gradients[1]))


# How rows (4), tokens (6), vocabulary (16) and width (8) may be cut over 8 devices.
LAYOUTS = {
    "vocab": ((2, 1, 4), {"rows": ("a",), "vocab": ("c",)}),
    "tokens": ((2, 2, 2), {"rows": ("a",), "tokens": ("b",), "vocab": ("c",)}),
    "width": ((4, 1, 2), {"rows": ("a",), "vocab": ("c",), "width": ("a",)}),
    "two axes of rows": ((2, 2, 2), {"rows": ("a", "b"), "vocab": ("c",), "width": ("b",)}),
    "copies": ((2, 2, 2), {"rows": ("a",)}),
}


def make_mesh(shape, names):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def layout_of(name):
    shape, axes = LAYOUTS[name]
    return Layout(mesh=make_mesh(shape, ("a", "b", "c")), **axes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_sharded_equals_unsharded(name):
    hidden, table, source, target, is_valid, bars = problem()
    entries = {"source": source, "target": target, "is_valid": is_valid, "temperature": 0.7}
    one = functools.partial(scored_logprobs, **entries)
    many = functools.partial(scored_logprobs, **entries, layout=layout_of(name), chunk_size=4)
    got = weighted(many, bars, is_valid)(hidden, table)
    assert_same(got, weighted(one, bars, is_valid)(hidden, table))


def reductions(program: str) -> list[str]:
    """Shape and operation of every all-reduce of a compiled program, each once."""
    found = re.findall(r"%(pmax|psum)\S* = (\S+)\{\S* all-reduce\(", program)
    assert len(found) == len(re.findall(r" all-reduce(?:-start)?\(", program))
    return sorted(f"{operation} {shape}" for operation, shape in found)


def test_collectives_are_one_max_and_one_sum_forward_and_one_sum_backward():
    hidden, table, source, target, _, _ = problem()
    layout = Layout(mesh=make_mesh((8,), ("vocab",)), vocab=("vocab",))
    score = functools.partial(scored_logprobs, source=source, target=target, layout=layout)

    def backward(hidden, table):
        return jax.vjp(score, hidden, table)[1]((jnp.ones(target.shape), jnp.ones(target.shape)))

    num_entries = ROWS * ENTRIES
    forward = jax.jit(score).lower(hidden, table).compile().as_text()
    assert reductions(forward) == [f"pmax f32[{num_entries}]", f"psum f32[3,{num_entries}]"]
    both = jax.jit(backward).lower(hidden, table).compile().as_text()
    num_slots = min(num_entries, ROWS * TOKENS)
    assert reductions(both) == sorted([*reductions(forward), f"psum f32[{num_slots},{WIDTH}]"])


def test_gradients_in_forward_reduce_what_belongs_to_a_block():
    hidden, table, source, target, is_valid, _ = problem()
    operands = operands_of(hidden, table, source, target, is_valid)
    layout = Layout(mesh=make_mesh((8,), ("vocab",)), vocab=("vocab",))

    def loss(hidden, table):
        entries = {"source": source, "target": target, "is_valid": is_valid}
        return scored_loss(
            clipped_loss, hidden, table, **entries, operands=operands, chunk_size=4, layout=layout
        )[0]

    program = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table).compile().as_text()
    # In the loop, whose turns are the blocks of 4 slots; and once before it, the logits of
    # targets beyond the first.
    assert reductions(program) == sorted(
        ["pmax f32[4]", "psum f32[3,4]", f"psum f32[4,{WIDTH}]", f"psum f32[{ROWS * ENTRIES}]"]
    )


def clipped_loss(logprobs, entropy, operands):
    """A per-token loss: clipped policy gradient with an entropy bonus."""
    ratio = jnp.exp(logprobs - operands["old"])
    worse = jnp.minimum(ratio * operands["gain"], jnp.clip(ratio, 0.8, 1.2) * operands["gain"])
    return -jnp.sum(operands["weight"] * (worse + 0.1 * entropy)) / operands["count"]


def operands_of(hidden, table, source, target, is_valid):
    logprobs, _ = plain(hidden, table, source, target)
    rng = np.random.default_rng(9)
    old = np.asarray(logprobs) + 0.3 * rng.normal(size=source.shape)
    gain = rng.normal(size=source.shape)
    return {
        "old": old.astype(np.float32),
        "gain": gain.astype(np.float32),
        "weight": is_valid.astype(np.float32),
        "count": np.float32(is_valid.sum()),
    }


@pytest.mark.parametrize("name", [None, *LAYOUTS])
def test_gradient_in_forward_equals_automatic_differentiation(name):
    hidden, table, source, target, is_valid, _ = problem()
    operands = operands_of(hidden, table, source, target, is_valid)
    entries = {"source": source, "target": target, "is_valid": is_valid}

    def in_forward(hidden, table):
        total, logprobs, entropy = scored_loss(
            clipped_loss,
            hidden,
            table,
            **entries,
            operands=operands,
            chunk_size=4,
            layout=None if name is None else layout_of(name),
        )
        return 3.0 * total, (logprobs, entropy)

    def recomputed(hidden, table):
        logprobs, entropy = scored_logprobs(hidden, table, **entries)
        flat = jax.tree.map(lambda x: x.reshape(-1) if np.ndim(x) else x, operands)
        total = clipped_loss(logprobs.reshape(-1), entropy.reshape(-1), flat)
        return 3.0 * total, (logprobs, entropy)

    got = jax.jit(jax.value_and_grad(in_forward, (0, 1), has_aux=True))(hidden, table)
    assert_same(got, jax.value_and_grad(recomputed, (0, 1), has_aux=True)(hidden, table))
    # Without a gradient the loss is the same.
    assert_same(jax.jit(in_forward)(hidden, table), got[0])


def test_gradient_in_forward_makes_three_products():
    hidden, table, _, _, _, _ = problem()
    states = hidden.reshape(-1, WIDTH)
    targets = jnp.arange(len(states)) % VOCAB

    def of_loss(states, table):
        return token_loss(
            lambda logprobs, entropy, weight: -jnp.sum(weight * logprobs),
            states,
            table,
            targets=targets,
            operands=jnp.ones(len(states)),
            chunk_size=8,
        )[0]

    def of_logprobs(states, table):
        return -jnp.sum(token_logprobs(states, table, targets, chunk_size=8)[0])

    def num_products(function):
        program = jax.jit(jax.value_and_grad(function, (0, 1))).lower(states, table).compile()
        return len(re.findall(r" dot\(", program.as_text()))

    assert num_products(of_loss) == 3
    assert num_products(of_logprobs) == 4
    assert_same(
        jax.value_and_grad(of_loss, (0, 1))(states, table),
        jax.value_and_grad(of_logprobs, (0, 1))(states, table),
    )


def test_token_loss_ignores_what_is_not_valid():
    hidden, table, _, _, _, _ = problem()
    states = hidden.reshape(-1, WIDTH)
    targets = jnp.arange(len(states)) % VOCAB

    def loss(logprobs, entropy, weight):
        return -jnp.sum(weight * logprobs)

    def of(states, count):
        return token_loss(
            loss,
            states,
            table,
            targets=targets[: len(states)],
            operands=np.ones(len(states), np.float32),
            num_valid=count,
            chunk_size=4,
        )[0]

    poisoned = states.copy()
    poisoned[5:] = np.inf
    value, gradient = jax.value_and_grad(of)(poisoned, 5)
    expected, expected_gradient = jax.value_and_grad(of)(states[:5], None)
    assert_same((value, gradient[:5]), (expected, expected_gradient))
    assert not np.any(np.asarray(gradient[5:]))


def test_width_must_be_cut_over_axes_that_cut_rows():
    hidden, table, source, target, _, _ = problem()
    layout = Layout(mesh=make_mesh((8,), ("a",)), width=("a",))
    with pytest.raises(ValueError, match=r"layout\.width must be among"):
        scored_logprobs(hidden, table, source=source, target=target, layout=layout)


def test_entries_without_rows_are_cut_as_tokens():
    hidden, table, _, _, _, _ = problem()
    states, targets = hidden.reshape(-1, WIDTH), np.arange(24, dtype=np.int32) % VOCAB
    mesh = make_mesh((2, 2, 2), ("a", "b", "c"))
    made = Layout(mesh=mesh, tokens=("a", "b"), vocab=("c",))
    assert_same(
        token_logprobs(states, table, targets, layout=made), token_logprobs(states, table, targets)
    )
    with pytest.raises(ValueError, match=r"name the mesh axes that cut K in layout\.tokens"):
        token_logprobs(states, table, targets, layout=made._replace(rows=("a",)))


def test_a_mesh_of_explicit_axes_is_refused():
    hidden, table, source, target, _, _ = problem()
    layout = Layout(mesh=jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,)))
    with pytest.raises(ValueError, match="axes of type Auto"):
        scored_logprobs(hidden, table, source=source, target=target, layout=layout)


def test_a_target_of_many_sources_is_summed_in_float32():
    # Added to a bfloat16 row one by one, 2,048 terms would be half lost.
    rng = np.random.default_rng(0)
    hidden, table = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2048, 16), (40, 16))
    )
    targets = jnp.stack([jnp.arange(2048) % 40, jnp.full(2048, 7)], axis=1)

    def loss(score, hidden, table):
        return jnp.sum(score(hidden, table))

    def ours(hidden, table):
        return token_logprobs(hidden, table, targets)[0]

    def naive(hidden, table):
        logits = jnp.einsum("kd,vd->kv", hidden, table, preferred_element_type=jnp.float32)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=1)

    def gradients(score, dtype):
        made = jax.grad(functools.partial(loss, score), (0, 1))(
            hidden.astype(dtype), table.astype(dtype)
        )
        return [np.asarray(x, np.float64) for x in made]

    exact = gradients(naive, jnp.float32)
    for got, plain, truth in zip(
        gradients(ours, jnp.bfloat16), gradients(naive, jnp.bfloat16), exact, strict=True
    ):
        error, bar = (np.linalg.norm(x - truth) / np.linalg.norm(truth) for x in (got, plain))
        # Three roundings of one size where automatic differentiation makes one: the derivatives by
        # the logits, the gradient through all logits, and the sum with that of the second target.
        assert error < 3**0.5 * bar


@pytest.mark.parametrize("num_valid", [40, 45])
def test_more_valid_entries_than_there_are_count_as_all(num_valid):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(40, WIDTH)).astype(np.float32)
    table = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)

    def gradient(**settings):
        def total(hidden):
            return token_loss(
                lambda logprobs, entropy, weight: jnp.sum(weight * logprobs),
                hidden,
                table,
                targets=np.arange(40) % VOCAB,
                operands=np.ones(40, np.float32),
                chunk_size=16,
                **settings,
            )[0]

        return jax.grad(total)(hidden)

    np.testing.assert_array_equal(gradient(num_valid=num_valid), gradient())


def test_nothing_to_score():
    hidden, table, *_ = problem()
    none = np.zeros((ROWS, 0), np.int32)

    def loss(logprobs, entropy, operands):
        return jnp.sum(logprobs)

    total, logprobs, entropy = scored_loss(
        loss, hidden, table, source=none, target=none, operands=none
    )
    assert float(total) == 0
    assert logprobs.shape == entropy.shape == (ROWS, 0)
    empty = np.zeros(0, np.int32)
    found = token_loss(loss, hidden[0, :0], table, targets=empty, operands=empty)
    assert float(found[0]) == 0


class TestRefused:
    def test_rows_that_are_not_there(self):
        # By itself: the type checks of tests would be faster.
        hidden, table, source, target, _, _ = problem()
        with pytest.raises(ValueError, match=r"source, target and is_valid \[B K\].*\(1, 6, 8\)"):
            checks.check_entries(
                "scored_loss",
                jnp.asarray(hidden[:1]),
                jnp.asarray(table),
                source,
                target,
                None,
                1.0,
            )

    def test_operands_of_another_shape(self):
        hidden, table, source, target, _, _ = problem()
        with pytest.raises(ValueError, match=r"entries' shape, \(4, 10\).*shape \(10,\)"):
            scored_loss(
                clipped_loss, hidden, table, source=source, target=target, operands=np.ones(10)
            )

    def test_two_dtypes(self):
        hidden, table, source, target, _, _ = problem()
        with pytest.raises(ValueError, match=r"of one dtype; got float32\[4, 6, 8\] and bfloat16"):
            scored_logprobs(hidden, table.astype(jnp.bfloat16), source=source, target=target)

    @pytest.mark.parametrize("temperature", [0.0, -1.0, np.array([1.0, 0.0])])
    def test_a_temperature_that_divides_nothing(self, temperature):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            token_logprobs(np.ones((2, 4)), np.ones((3, 4)), np.zeros(2, int), temperature)

    @pytest.mark.parametrize(
        ("axes", "message"),
        [
            ({"rows": ("a",), "vocab": ("a",)}, "can cut one of these only"),
            ({"vocab": "a"}, r"layout.vocab must be a tuple of axes of the mesh.*got 'a'"),
            ({"heads": ("d",)}, r"layout.heads must be .* got \('d',\)"),
        ],
    )
    def test_layouts(self, axes, message):
        hidden, table, source, target, _, _ = problem()
        layout = Layout(mesh=make_mesh((2, 2, 2), ("a", "b", "c")), **axes)
        with pytest.raises(ValueError, match=message):
            scored_logprobs(hidden, table, source=source, target=target, layout=layout)
