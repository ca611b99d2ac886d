"""The sampler against transformers' logits processors, and against its own probabilities."""

import math
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmrun.constraint import allowed_tokens
from llmrun.errors import InternalError, NumericError, UsageError
from llmrun.logprobs import token_logprobs
from llmrun.sampler import Sampler, SamplingParams, TokenHistory, _nucleus, _top_k, _top_p


def _logits(seed, size=50, scale=3.0):
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


class _Grid:
    """Stands for the random generator: draws are spread evenly over [0, 1), so that counts are probabilities."""

    def __init__(self, count):
        self.draws = iter((np.arange(count) + 0.5) / count)

    def random(self):
        return next(self.draws)


def _distribution(params, logits, context=(), count=4000):
    sampler = Sampler(params)
    sampler._rng = _Grid(count)
    ids = [sampler.sample(logits, context) for _ in range(count)]
    return np.bincount(ids, minlength=len(logits)) / count


def _reference(params, logits, context=()):
    """Probabilities by transformers' processors in the order of GenerationMixin."""
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.tensor(logits)[None]
    steps = []
    if params.repeat_penalty != 1:
        steps.append(processors.RepetitionPenaltyLogitsProcessor(params.repeat_penalty))
    steps.append(processors.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(processors.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(processors.TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(processors.MinPLogitsWarper(params.min_p))
    for step in steps:
        scores = step(torch.tensor([list(context)], dtype=torch.long), scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_k": 10_000},
        {"temperature": 1.0, "top_p": 0.1},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 5.0, "top_p": 0.999},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "min_p": 0.9},
        {"temperature": 1.0, "repeat_penalty": 1.3},
        {"temperature": 1.0, "repeat_penalty": 0.5},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repeat_penalty": 1.1},
        {"temperature": 3.0, "top_k": 40, "top_p": 0.95, "min_p": 0.1, "repeat_penalty": 2.0},
    ],
    ids=str,
)
def test_distribution_is_that_of_transformers(values, seed):
    params = SamplingParams(**values)
    logits, context = _logits(seed, size=300), [3, 3, 17, 299, 0]
    ours = _distribution(params, logits, context)
    theirs = _reference(params, logits, context)
    assert np.abs(ours - theirs).max() < 1 / 2000  # an even grid of 4000 draws is off by two steps at most
    assert not ours[theirs == 0].any()


@pytest.mark.parametrize("size", [19_968, 20_037])
@pytest.mark.parametrize(
    "values", [{}, {"top_k": 40}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_p": 0.9, "min_p": 0.1}], ids=str
)
def test_distribution_of_a_large_vocabulary_is_that_of_transformers(values, size):
    logits = _logits(4, size) * np.float32(1.5)
    logits[[0, 255, 256, size - 1]] = logits.max() - 0.5  # where runs of tokens begin and end
    params = SamplingParams(temperature=0.9, **values)
    ours, theirs = _distribution(params, logits), _reference(params, logits)
    assert np.abs(ours - theirs).max() < 1 / 2000
    assert not ours[theirs == 0].any()


@pytest.mark.parametrize("k", [1, 20, 312, 313, 5000])
@pytest.mark.parametrize("place", [lambda i: i, lambda i: -i, lambda i: i * 64 % 20_037], ids=["up", "down", "spread"])
def test_the_highest_of_a_large_vocabulary_are_those_of_a_sort(k, place):
    scores = np.round(_logits(5, 20_037), 1)  # many are equal
    scores = np.sort(scores)[place(np.arange(len(scores)))]
    scores[:7] = -np.inf
    np.testing.assert_array_equal(_top_k(scores, k), np.sort(np.argsort(-scores, kind="stable")[:k]))


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.9999, math.nextafter(1, 0)])
@pytest.mark.parametrize("scale", [0.01, 0.7, 6.0], ids=["flat", "between", "steep"])
@pytest.mark.parametrize("size", [1, 300, 20_037])
def test_top_p_keeps_the_likeliest_that_add_up_to_it(size, scale, top_p):
    logits = np.round(_logits(6, size, scale), 2)  # many are equal
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    order = np.argsort(-weights, kind="stable")
    sums = np.cumsum(weights[order])
    expected = order[np.append(0.0, sums[:-1]) < top_p * float(weights.sum())]
    np.testing.assert_array_equal(np.sort(_top_p(weights, top_p)), np.sort(expected))
    found = _nucleus(logits, float(logits.max()), 1.0, top_p)
    assert len(set(found)) == len(found)
    assert weights[np.setxor1d(found, expected)].sum() <= 1e-6 * weights.sum()  # of sums in float32


def test_top_p_sorts_beyond_its_first_guess():
    logits = _logits(1, size=2500, scale=0.1)
    params = SamplingParams(temperature=1.0, top_p=0.5)
    ours = _distribution(params, logits, count=8000)
    theirs = _reference(params, logits)
    assert (theirs > 0).sum() > 1000
    assert not ours[theirs == 0].any()
    assert np.abs(ours - theirs).max() < 2 / 8000


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(SamplingParams(temperature=1.0, seed=7))
    counts = np.bincount([sampler.sample(logits, []) for _ in range(20_000)], minlength=4)
    expected = np.array([0.5, 0.3, 0.15, 0.05]) * 20_000
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 16.3  # 0.1 % point for three degrees of freedom


def test_temperature_zero_takes_the_first_largest():
    logits = np.array([1.0, 5.0, 5.0, -np.inf], np.float32)
    assert Sampler(SamplingParams()).sample(logits, []) == 1


def test_repeat_penalty_holds_for_greedy_too():
    logits = np.array([1.0, 5.0, 4.9], np.float32)
    assert Sampler(SamplingParams(repeat_penalty=1.5)).sample(logits, [1, 1]) == 2
    assert logits[1] == 5.0


@pytest.mark.parametrize("temperature", [sys.float_info.min, 1e-300, 1e-30, 1e-9])
def test_tiny_temperatures_are_greedy_without_overflow(temperature):
    logits = np.array([-3e38, 3.0, 2.999, -np.inf, 1e-30], np.float32)
    with np.errstate(all="raise", under="ignore"):
        assert Sampler(SamplingParams(temperature=temperature, seed=1)).sample(logits, []) == 1


def test_top_k_of_equal_logits_keeps_exactly_k():
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=3, seed=1))
    assert {sampler.sample(np.zeros(100, np.float32), []) for _ in range(200)} == {0, 1, 2}


def test_impossible_tokens_are_never_drawn():
    logits = np.full(1000, -np.inf, np.float32)
    logits[[10, 20]] = 0
    sampler = Sampler(SamplingParams(temperature=100.0, top_k=500, top_p=0.99999, min_p=0.0001, seed=1))
    assert {sampler.sample(logits, []) for _ in range(100)} == {10, 20}


def test_the_last_draw_below_one_is_no_impossible_token():
    sampler = Sampler(SamplingParams(temperature=1.0))
    sampler._rng = type("Ones", (), {"random": lambda self: math.nextafter(1.0, 0.0)})()
    assert sampler.sample(np.array([0, 0, -np.inf, -np.inf], np.float32), []) == 1


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_same_seed_gives_same_tokens(seed):
    params = SamplingParams(temperature=1.5, top_k=40, top_p=0.95, min_p=0.01, seed=seed)
    first, second = Sampler(params), Sampler(params)
    rows = [_logits(i, size=400) for i in range(50)]
    assert [first.sample(row, []) for row in rows] == [second.sample(row, []) for row in rows]


def test_without_a_seed_samplers_differ():
    rows = [_logits(i, size=400, scale=0.1) for i in range(20)]
    samplers = [Sampler(SamplingParams(temperature=1.0)) for _ in range(2)]
    runs = {tuple(sampler.sample(row, []) for row in rows) for sampler in samplers}
    assert len(runs) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_and_infinity_are_numeric_errors(value, temperature):
    with pytest.raises(NumericError, match="NaN or infinity"):
        Sampler(SamplingParams(temperature=temperature)).sample(np.array([0, value, 1], np.float32), [])


def test_all_minus_infinity_is_a_numeric_error():
    with pytest.raises(NumericError):
        Sampler(SamplingParams()).sample(np.full(3, -np.inf, np.float32), [])


@pytest.mark.parametrize("context", [[-1], [5]])
def test_context_ids_outside_the_vocabulary_are_refused(context):
    with pytest.raises(UsageError, match="context ids"):
        Sampler(SamplingParams(repeat_penalty=1.1)).sample(np.zeros(5, np.float32), context)


@pytest.mark.parametrize("shape", [(0,), (2, 3)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(UsageError, match="vocab_size"):
        Sampler(SamplingParams()).sample(np.zeros(shape, np.float32), [])


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, 100.1, NAN, "1", None, True, 1e9]),
        ("top_k", [-1, 1.5, NAN, "1", None, True]),
        ("top_p", [0, -1, 1.01, NAN, "1", None, True]),
        ("min_p", [-0.1, 1, NAN, "1", None, True]),
        ("repeat_penalty", [0, -1, 10.1, NAN, math.inf, "1", None]),
        ("seed", [-1, 2**63, 1.5, "1", False]),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(UsageError, match=f"{name} is .*expected"):
            SamplingParams(**{name: value})


def test_limits_themselves_are_allowed():
    SamplingParams(temperature=100, top_k=10**9, top_p=1, min_p=0, repeat_penalty=10, seed=2**63 - 1)
    SamplingParams(temperature=np.float32(0.5), top_k=np.int64(4), seed=0)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 60),
    top_p=st.floats(1e-6, 1),
    min_p=st.floats(0, 0.999),
    penalty=st.floats(0.01, 10),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_any_parameters_draw_an_id_of_the_vocabulary(logits, temperature, top_k, top_p, min_p, penalty, seed, data):
    context = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=10))
    row = np.array(logits, np.float32)
    before = row.copy()
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty, seed)
    assert 0 <= Sampler(params).sample(row, context) < len(logits)
    assert (row == before).all()


@settings(max_examples=200)
@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30),
    repeat=st.floats(0.1, 10),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    data=st.data(),
)
def test_penalties_and_bias_follow_their_formulas(logits, repeat, presence, frequency, data):
    size = len(logits)
    ids = st.lists(st.integers(0, size - 1), max_size=15)
    prompt, generated = data.draw(ids), data.draw(ids)
    bias = data.draw(st.dictionaries(st.integers(0, size - 1), st.floats(-20, 20), max_size=4))
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    allowed[data.draw(st.integers(0, size - 1))] = True
    expected = np.full(size, -np.inf)
    for i in range(size):  # each formula as its paper or API reference writes it, one id at a time, in float64
        if not allowed[i]:
            continue
        value = float(np.float32(logits[i])) + bias.get(i, 0.0)
        if i in prompt or i in generated:
            value = value * repeat if value < 0 else value / repeat
        value -= frequency * generated.count(i) + presence * (i in generated)
        expected[i] = value
    params = SamplingParams(repeat_penalty=repeat, presence_penalty=presence, frequency_penalty=frequency)
    history = TokenHistory(prompt)
    for token_id in generated:
        history.append(token_id)
    row = np.array(logits, np.float32)
    chosen = Sampler(params, bias).sample(row, history, allowed)
    assert allowed[chosen]
    assert expected[chosen] >= expected.max() - 1e-4 * max(1.0, abs(expected.max()))
    assert (row == np.array(logits, np.float32)).all()


@example([3, 1], [*range(300), *range(150, 400)])
@given(st.lists(st.integers(0, 9), max_size=10), st.lists(st.integers(0, 9), max_size=200))
def test_a_history_counts_what_was_generated(prompt, generated):
    history = TokenHistory(prompt, generated)
    assert sorted(history.ids) == sorted({*prompt, *generated})
    assert dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True)) == {
        i: generated.count(i) for i in {*prompt, *generated}
    }


def test_a_top_p_just_below_one_keeps_all():
    # For half of these rows rounding leaves all probabilities together below it.
    for seed in range(8):
        logits = _logits(seed, 700)
        below = _distribution(SamplingParams(temperature=1.0, top_p=math.nextafter(1, 0)), logits, count=2000)
        off = _distribution(SamplingParams(temperature=1.0), logits, count=2000)
        assert np.abs(below - off).max() < 1.5 / 2000  # a draw more or less, for the order is another


def test_nothing_allowed_is_refused():
    with pytest.raises(UsageError, match="allows no token"):
        Sampler(SamplingParams()).sample(np.zeros(3, np.float32), [], np.zeros(3, np.bool_))


@settings(max_examples=100)
@given(st.integers(1, 300), st.integers(0, 400), st.integers(0, 2**32 - 1), st.floats(0.01, 100))
def test_log_probabilities_add_up_and_the_likeliest_come_first(size, num_top, seed, scale):
    rows = (np.random.default_rng(seed).standard_normal((3, size)) * scale).round(1).astype(np.float32)
    tokens = [0, size // 2, size - 1]
    wide = rows.astype(np.float64)
    expected = wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)
    for entry, row, token in zip(token_logprobs(rows, tokens, num_top), expected, tokens, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row[token], abs=1e-9)
        order = np.argsort(-row, kind="stable")[:num_top]
        assert [p for _, p in entry.top] == pytest.approx(list(row[order]), abs=1e-9)
        assert [i for i, _ in entry.top] == list(order)
        assert len(entry.top) == min(num_top, size)


@given(st.lists(st.booleans(), min_size=1, max_size=100), st.integers(1, 120))
def test_packed_masks_are_those_of_bools(bits, vocab_size):
    expected = np.array([*bits, *[False] * vocab_size][:vocab_size])
    assert (allowed_tokens(np.array(bits), vocab_size) == expected).all()
    packed = np.packbits(np.array(bits), bitorder="little")
    packed = np.concatenate([packed, np.zeros(-len(packed) % 8, np.uint8)])
    for kind in (np.uint8, np.int32, np.uint32, np.uint64):
        assert (allowed_tokens(packed.view(kind), vocab_size) == expected).all()


def test_a_mask_that_is_none_is_refused():
    for mask in (np.zeros(3, np.float32), np.zeros((1, 3), np.bool_)):
        with pytest.raises(InternalError, match="mask has type"):
            allowed_tokens(mask, 3)
