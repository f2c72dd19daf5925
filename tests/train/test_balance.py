"""Loss-free balancing: what is counted, the sign rule, and that it makes loads even."""

import numpy as np
import pytest

import minstep
from minstep.model import decoder
from minstep.moe import MoEWeights, route
from minstep.tap import Array
from minstep.train.balance import Counter, balance

CONFIG = minstep.load_config(minstep.find_config("tiny"))
MOE = [spec for spec in CONFIG.layers if spec.moe]


def test_it_counts_what_the_router_chose_in_every_layer() -> None:
    weights = minstep.random_weights(CONFIG, np.random.default_rng(0))
    tokens = np.random.default_rng(1).integers(0, 320, 50).tolist()
    counter = Counter(CONFIG)
    assert list(counter.counts) == [f"{spec.name}.moe" for spec in MOE]
    decoder(tokens, weights, CONFIG, tap=counter)
    once = {name: counts.copy() for name, counts in counter.counts.items()}
    for spec in MOE:
        assert spec.moe
        assert len(once[f"{spec.name}.moe"]) == spec.moe.experts
        assert once[f"{spec.name}.moe"].sum() == 50 * spec.moe.top_k
    decoder(tokens, weights, CONFIG, tap=counter)
    assert all((counter.counts[name] == 2 * counts).all() for name, counts in once.items())
    assert len({tuple(counts) for counts in once.values()}) == len(once)  # each its own


def test_it_counts_experts_and_nothing_else() -> None:
    counter = Counter(CONFIG)
    layer = f"{MOE[0].name}.moe"
    ids = np.array([[0, 2], [2, 3]])
    tap = counter.at(MOE[0].name).at("moe")
    assert tap("ids", ids) is ids
    tap("weights", np.ones((2, 2)))
    assert counter.counts[layer][:5].tolist() == [1, 0, 2, 1, 0]
    assert not any(counts.any() for name, counts in counter.counts.items() if name != layer)
    with pytest.raises(KeyError):
        counter.at("model.layers.99.moe")("ids", ids)


def test_it_wants_the_path_of_attention_that_has_gradients() -> None:
    tap = Counter(CONFIG).at("model.layers.0.self_attn")
    assert tap.wants("probs") and not tap.wants("margin")


def test_the_rule_sees_the_side_and_not_the_distance() -> None:
    bias = np.zeros(4, np.float32)
    other = np.zeros(4, np.float32)
    tensors = {"a.router_bias": bias, "a.gate.weight": other, "b.router_bias": other}
    balance(tensors, {"a": np.array([0, 3, 4, 5])}, 0.001)
    np.testing.assert_array_equal(bias, np.array([0.001, 0, -0.001, -0.001], np.float32))
    assert bias.dtype == np.float32 and not other.any()


def test_even_loads_move_nothing() -> None:
    bias = np.array([0.5, -0.5, 0.1], np.float32)
    balance({"a.router_bias": bias}, {"a": np.array([7, 7, 7])}, 0.001)
    assert bias.tolist() == np.array([0.5, -0.5, 0.1], np.float32).tolist()


def test_the_mean_need_not_be_a_whole_number() -> None:
    bias = np.zeros(3, np.float32)
    balance({"a.router_bias": bias}, {"a": np.array([3, 3, 4])}, 1.0)
    assert bias.tolist() == [1, 1, -1]


def test_a_router_without_a_bias_is_left_alone() -> None:
    balance({}, {"a": np.array([1, 2])}, 0.001)


def test_skewed_loads_become_even() -> None:
    """Some experts' scores are far ahead for every token; the bias alone brings the others in."""
    rng = np.random.default_rng(0)
    spec = MOE[0].moe
    assert spec
    E, D = spec.experts, 16
    lean = np.linspace(-2, 2, E)
    gate = np.c_[rng.standard_normal((E, D)) * 0.5, lean]  # [E, D + 1]
    tensors = {f"{MOE[0].name}.moe.router_bias": np.zeros(E, np.float32)}
    nothing = np.empty(0)

    def loads() -> Array:
        x = np.c_[rng.standard_normal((512, D)), np.ones(512)]  # [T, D + 1]
        bias = tensors[f"{MOE[0].name}.moe.router_bias"]
        counter = Counter(CONFIG)
        weights = MoEWeights(gate, bias, nothing, nothing, nothing)
        route(x, weights, spec, counter.at(f"{MOE[0].name}.moe"))
        counts = counter.counts[f"{MOE[0].name}.moe"]
        balance(tensors, counter.counts, 0.01)
        return counts / counts.mean()

    before = loads()
    assert before.min() < 0.1 and before.max() > 1.8
    for _ in range(300):
        after = loads()
    assert after.min() > 0.7 and after.max() < 1.3
