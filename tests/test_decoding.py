"""One decoded token: few operators, the same numbers, and nothing out of date whatever is done to a model meanwhile."""

import copy
import importlib.util
import sys

import pytest
import torch
from accelerate.utils import clean_state_dict_for_safetensors
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast

import transact
from tests.tiny import FAMILIES, VARIANTS, random_plan, scores_of, tiny_llama, tiny_relative, zeroed
from transact import Widths, dense_widths, modeling_transact, select
from transact.modeling_transact import CACHE, is_exact_in_parts, joined_product, parts_of_outputs, product_of_few

IDS = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(1))
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="products are divided for MKL alone")
WIDTHS = {"whole": (16, 16, 40), "equal": (8, 8, 24), "keys wider": (12, 7, 24), "values wider": (6, 13, 24)}


def narrowed_to(dense, qk: int, v: int, mlp: int):
    widths = [Widths(dense.config.num_key_value_heads, qk, v, mlp)] * 2
    return transact.apply_plan(dense, select(scores_of(dense, "random"), widths))


def cache_of(model, kind: str):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=20)


@torch.no_grad()
def decoded(model, kind: str = "dynamic", *, after: int = 8, **inputs) -> torch.Tensor:
    """Logits (batch, tokens, vocabulary) of the tokens that come one by one after a prompt."""
    cache = cache_of(model, kind)
    model(input_ids=IDS[:, :after], **{CACHE: cache}, **{name: x[:, :after] for name, x in inputs.items()})
    return torch.cat([
        model(
            input_ids=IDS[:, place : place + 1], **{CACHE: cache},
            **{name: x[:, : place + 1] for name, x in inputs.items()},
        ).logits
        for place in range(after, IDS.shape[1])
    ], dim=1)  # fmt: skip


@torch.no_grad()
def read_at_once(model, *, after: int = 8, **inputs) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False, **inputs).logits[:, after:]


def assert_same(actual: torch.Tensor, expected: torch.Tensor):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual / scale, expected / scale, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def calls_of_a_step(model, length: int = 1) -> dict[str, int]:
    """How often each operator is called, those that operators call included."""
    cache = cache_of(model, "dynamic")
    with torch.no_grad():
        for ids in (IDS, IDS[:, :1]):
            model(input_ids=ids, **{CACHE: cache})
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            model(input_ids=IDS[:, :length], **{CACHE: cache})
    return {event.key: event.count for event in seen.key_averages()}


@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize("widths", WIDTHS)
def test_a_step_calls_fewer_operators_than_the_dense_model(widths, threads):
    dense = tiny_llama("gqa")
    narrow, whole = calls_of_a_step(narrowed_to(dense, *WIDTHS[widths])), calls_of_a_step(dense)
    assert sum(narrow.values()) < sum(whole.values())
    assert narrow["aten::mm"] == 4 * 2 + 1


def needs_exact_parts(threads: int):
    if not all(is_exact_in_parts(parts) for parts in range(2, threads + 1)):
        pytest.skip("products are not divided on this processor: in parts their bits are others")


@needs_mkl
@torch.no_grad()
@pytest.mark.parametrize("outputs", [32, 97, 100, 840, 1024, 2166, 49153])
def test_products_of_few_rows_are_divided_among_threads_bit_for_bit(outputs, threads):
    needs_exact_parts(threads)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(outputs, 576, generator=generator), torch.randn(outputs, generator=generator)
    for rows in (1, 2, 3, 4, 40):
        inputs = torch.randn(rows, 576, generator=generator)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            found = product_of_few(inputs, weight.t(), None)
        is_divided = "aten::bmm" in {event.key for event in seen.key_averages()}
        assert is_divided == (threads > 1 and rows <= 3)
        assert torch.equal(found, functional.linear(inputs, weight))
        assert torch.equal(product_of_few(inputs, weight.t(), bias), functional.linear(inputs, weight, bias))
        assert product_of_few(inputs.double(), weight.double().t(), None).dtype == torch.float64


@needs_mkl
def test_all_products_of_a_step_are_divided(threads):
    needs_exact_parts(threads)
    narrow = narrowed_to(tiny_llama("gqa"), 12, 12, 32)
    of_a_step, of_four_tokens = (calls_of_a_step(narrow, length).get("aten::bmm", 0) for length in (1, 4))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        narrow.model.rotary_emb(torch.zeros(1), torch.arange(4)[None])
    of_tables = sum(event.count for event in seen.key_averages() if event.key == "aten::bmm")  # in older transformers
    assert of_four_tokens == of_tables
    assert of_a_step - of_tables == (0 if threads == 1 else 4 * 2 + 1)
    expected = decoded(narrow)
    narrow.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    assert torch.equal(decoded(narrow), 2 * expected)


@needs_mkl
def test_more_threads_than_parts_of_sixteen_do_no_harm():
    assert parts_of_outputs(576, 64) == (36, 16)
    assert parts_of_outputs(49153, 64) == (64, 752)  # and 1,025 at once, of which 1 would be summed otherwise
    assert parts_of_outputs(40, 64) == (1, 0)
    assert parts_of_outputs(15, 2) == parts_of_outputs(4096, 1) == (1, 0)


def test_products_that_are_not_exact_in_parts_are_not_divided(monkeypatch):
    monkeypatch.setattr(modeling_transact, "product_in_parts", lambda inputs, matrix, *_: inputs @ matrix * 1.0001)
    assert not is_exact_in_parts.__wrapped__(2)


@pytest.mark.parametrize("widths", ["keys wider", "values wider"])
def test_no_scores_of_all_queries_and_no_copies_of_keys(widths):
    narrow = narrowed_to(tiny_llama("gqa"), *WIDTHS[widths])
    for length in (1, 4):
        assert "aten::_scaled_dot_product_attention_math" not in calls_of_a_step(narrow, length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_that_keeps_everything_is_bit_equal(variant, kind, dtype, threads):
    dense = tiny_llama(variant).to(dtype)
    narrowed = transact.apply_plan(dense, select(scores_of(dense, "random"), dense_widths(dense.config)))
    assert torch.equal(decoded(narrowed, kind), decoded(dense, kind))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("variant", [*VARIANTS, *FAMILIES])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_steps_equal_those_of_the_zeroed_dense_model(variant, kind, attention, threads):
    dense = tiny_relative(variant) if variant in FAMILIES else tiny_llama(variant)
    dense.set_attn_implementation(attention)
    plan = random_plan(dense.config, seed=3, drop_heads=True)
    narrowed, oracle = transact.apply_plan(dense, plan), zeroed(dense, plan)
    assert_same(decoded(narrowed, kind), decoded(oracle, kind))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_padded_prompts(widths, kind):
    narrow = narrowed_to(tiny_llama("gqa"), *WIDTHS[widths])
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    assert_same(decoded(narrow, kind, attention_mask=mask), read_at_once(narrow, attention_mask=mask))


def halve_in_place(model):
    model.load_state_dict({name: x / 2 if x.is_floating_point() else x for name, x in model.state_dict().items()})


def assign_halves(model):
    halves = {name: x / 2 if x.is_floating_point() else x for name, x in model.state_dict().items()}
    model.load_state_dict(halves, assign=True)


def give_new_memory(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.7


def to_float64_and_back(model):
    model.to(torch.float64).to(torch.float32)


def replace_one_projection(model):
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight = torch.nn.Parameter(attention.k_proj.weight.flip(1).contiguous())


def give_one_projection_a_bias(model):
    projection = model.model.layers[1].mlp.up_proj
    projection.bias = torch.nn.Parameter(torch.ones(projection.out_features))


def take_one_projection_s_bias(model):
    model.model.layers[1].mlp.up_proj.bias = None
    model.model.layers[0].mlp.gate_proj.weight.data += 0.1


def hook_one_projection(model):
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: output * 2)


def hook_its_input(model):
    model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def wrap_its_forward(model):
    projection = model.model.layers[0].mlp.gate_proj
    forward = projection.forward
    projection.forward = lambda inputs: forward(inputs) + 1


def keep_other_pairs(model):
    model.model.layers[1].self_attn.rope_pairs += 1


def add_adapters(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False), model)


def train_one_step(model):
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.eval()


CHANGES = [
    halve_in_place, assign_halves, give_new_memory, to_float64_and_back, replace_one_projection,
    give_one_projection_a_bias, take_one_projection_s_bias, hook_one_projection, hook_its_input, wrap_its_forward,
    keep_other_pairs, add_adapters, train_one_step,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("variant", ["gqa", "biases"])
def test_what_is_done_between_two_steps_is_noticed(variant, change):
    narrow = narrowed_to(tiny_llama(variant), 12, 7, 24)
    before = decoded(narrow)
    change(narrow)
    assert_same(decoded(narrow), read_at_once(narrow))
    if change is not to_float64_and_back:
        assert not torch.allclose(decoded(narrow), before)


@pytest.mark.parametrize("threads", [1], indirect=True)
def test_saved_after_decoding_is_what_was_loaded(tmp_path, threads):
    narrow = narrowed_to(tiny_llama("biases"), 12, 7, 24)
    narrow.save_pretrained(tmp_path / "before")
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    expected = decoded(narrow)
    assert all(torch.equal(tensor, before[name]) for name, tensor in narrow.state_dict().items())
    narrow.save_pretrained(tmp_path / "after")
    files = [(tmp_path / side / "model.safetensors").read_bytes() for side in ("before", "after")]
    assert files[0] == files[1]
    loaded = transact.TransActForCausalLM.from_pretrained(tmp_path / "after")
    assert torch.equal(decoded(loaded), expected)
    assert calls_of_a_step(loaded)["aten::addmm"] == 2 * 4


def test_weights_take_no_more_memory_and_copies_are_their_own():
    narrow = narrowed_to(tiny_llama("gqa"), 12, 7, 24)
    expected = decoded(narrow)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in narrow.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in narrow.parameters())
    twin = copy.deepcopy(narrow)
    with torch.no_grad():
        for parameter in narrow.parameters():
            parameter.zero_()
    assert torch.equal(decoded(twin), expected)


def test_decoding_in_inference_mode_leaves_a_model_that_trains():
    narrow = narrowed_to(tiny_llama("gqa"), 12, 7, 24)
    with torch.inference_mode():
        decoded(narrow)
    assert not any(parameter.is_inference() for parameter in narrow.parameters())
    train_one_step(narrow)
    assert all(parameter.grad is not None for parameter in narrow.parameters())


def test_weights_that_are_views_of_something_else_stay_so():
    narrow = narrowed_to(tiny_llama("gqa"), 12, 7, 24)
    flat = torch.nn.utils.parameters_to_vector(narrow.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat, narrow.parameters())
    expected = read_at_once(narrow)
    assert_same(decoded(narrow), expected)
    assert {p.untyped_storage().data_ptr() for p in narrow.parameters()} == {flat.untyped_storage().data_ptr()}


@pytest.mark.parametrize("change", [None, add_adapters, train_one_step])
def test_a_state_holds_every_weight_in_a_memory_of_its_own(change):
    """accelerate saves one of all tensors in the same memory, and says nothing that stops anyone."""
    narrow = narrowed_to(tiny_llama("gqa"), 12, 7, 24)
    expected = decoded(narrow)
    if change is not None:
        change(narrow)
    with torch.inference_mode():
        state = narrow.state_dict()
    assert not any(tensor.is_inference() for tensor in state.values())
    assert clean_state_dict_for_safetensors(dict(state)).keys() == state.keys()
    if change is None:
        assert torch.equal(decoded(narrow), expected)
    name = next(name for name in state if name.endswith("1.self_attn.k_proj.weight"))
    narrow.state_dict()[name].zero_()  # the model's own, as that of any module
    assert not narrow.get_parameter(name).any()
    assert_same(decoded(narrow), read_at_once(narrow))
    assert narrow.state_dict().keys() == state.keys()


def test_a_state_leaves_weights_where_others_keep_them():
    narrow = narrowed_to(tiny_llama("gqa"), 12, 7, 24)
    decoded(narrow)
    flat = torch.nn.utils.parameters_to_vector(narrow.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat, narrow.parameters())
    decoded(narrow)
    narrow.state_dict()
    assert {p.untyped_storage().data_ptr() for p in narrow.parameters()} == {flat.untyped_storage().data_ptr()}


def test_memory_that_processes_share_stays_shared():
    narrow = narrowed_to(tiny_llama("gqa"), 12, 7, 24).share_memory()
    assert_same(decoded(narrow), read_at_once(narrow))
    assert all(parameter.is_shared() for parameter in narrow.parameters())


def test_hooks_on_all_modules_see_every_product():
    narrow, seen = narrowed_to(tiny_llama("gqa"), 12, 7, 24), []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(module) if isinstance(module, torch.nn.Linear) else None
    )
    try:
        decoded(narrow, after=11)
    finally:
        handle.remove()
    assert len(seen) == 2 * (7 * 2 + 1)


def test_weights_in_two_memories_beside_each_other_are_no_row():
    memory = bytearray(4 * (2000 + 2 * 24 * 48))
    first, second = (torch.nn.Linear(48, 24, bias=False) for _ in range(2))
    first.weight = torch.nn.Parameter(torch.frombuffer(memory, dtype=torch.float32, count=2000 + 24 * 48)[2000:]
                                      .view(24, 48))  # fmt: skip
    second.weight = torch.nn.Parameter(torch.frombuffer(memory, dtype=torch.float32, offset=4 * (2000 + 24 * 48))
                                       .view(24, 48))  # fmt: skip
    with torch.no_grad():
        assert joined_product(torch.ones(1, 1, 48), first, second) is None


@pytest.mark.parametrize("variant", ["mha", "gqa"])
def test_dropout_of_a_model_in_training_is_drawn_in_steps_too(variant):
    dense = tiny_llama(variant)
    dense.config.attention_dropout = 0.5
    dense = type(dense)(dense.config)
    whole = transact.apply_plan(dense, select(scores_of(dense, "random"), dense_widths(dense.config)))
    logits = []
    for model in (dense, whole):
        torch.manual_seed(0)
        logits.append(decoded(model.train()))
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], decoded(dense.eval()))


def test_a_step_without_numbers_leaves_the_numbers(threads):
    for tried in (parts_of_outputs, is_exact_in_parts):  # not in a mode where nothing can be tried
        tried.cache_clear()
    narrow = narrowed_to(tiny_llama("gqa"), 12, 7, 24)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert decoded(narrow).shape == (2, 4, 97)
    assert all(type(parameter) is torch.nn.Parameter for parameter in narrow.parameters())
    expected = decoded(narrow)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert decoded(narrow).shape == (2, 4, 97)
    assert torch.equal(decoded(narrow), expected)


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("tokens", [1, 2])
def test_weights_that_a_cuda_graph_was_recorded_with_stay_in_their_memory(tokens, monkeypatch):
    """It reads there whatever happens to the model later; moved while it is recorded, they would lie in its memory."""
    narrow = narrowed_to(tiny_llama("gqa"), 12, 7, 24)
    linears, row = (narrow.model.layers[0].mlp.gate_proj, narrow.model.layers[0].mlp.up_proj), torch.ones(1, 1, 48)
    places = [linear.weight.data_ptr() for linear in linears]
    is_recording = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_recording[0])
    with torch.no_grad():
        assert joined_product(row.expand(1, tokens, 48).as_subclass(OnCuda), *linears) is None
        is_recording[0] = False
        assert joined_product(row.as_subclass(OnCuda), *linears) is None
        assert [linear.weight.data_ptr() for linear in linears] == places
        others = (narrow.model.layers[1].mlp.gate_proj, narrow.model.layers[1].mlp.up_proj)
        assert joined_product(row.as_subclass(OnCuda), *others) is not None  # no graph has seen these
        is_recording[0] = True
        assert joined_product(row.as_subclass(OnCuda), *others) is not None  # and these lie in a row already


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_layer_knows_the_cache_by_the_names_before_and_since_transformers_5_24(monkeypatch, name):
    """One that it does not know is never filled, and each token attends to itself alone, without an error."""
    monkeypatch.setattr(modeling_transact, "CACHE", name)
    narrow, cache = narrowed_to(tiny_llama("gqa"), 12, 7, 24), DynamicCache()
    tables = narrow.model.rotary_emb(torch.zeros(1), torch.arange(6)[None])
    for layer in narrow.model.layers:
        layer(torch.ones(1, 6, narrow.config.hidden_size), position_embeddings=tables, **{name: cache})
    assert [cache.get_seq_length(layer) for layer in range(len(narrow.model.layers))] == [6, 6]
    assert cache.layers[0].keys.shape[-1] == 12
    assert cache.layers[0].values.shape[-1] == 7


@pytest.mark.parametrize("widths", WIDTHS)
def test_continuous_batching_takes_whole_heads_and_refuses_others(widths):
    narrow = narrowed_to(tiny_llama("gqa"), *WIDTHS[widths])
    if widths != "whole":
        with pytest.raises(ValueError, match="has the dense model's heads in every layer, this model has others"):
            narrow.generate_batch([[3, 5, 7]])
        return
    plan = GenerationConfig(max_new_tokens=3, eos_token_id=-1, pad_token_id=0)
    assert narrow.init_continuous_batching(generation_config=plan) is not None


def modelling_file_again():
    spec = importlib.util.spec_from_file_location("transact.modeling_again", modeling_transact.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_name_of_the_cache_is_an_error_at_once(monkeypatch):
    monkeypatch.setattr(BaseModelOutputWithPast, "__dataclass_fields__", {"memory": None})
    with pytest.raises(ImportError, match="has another name for the KV cache: take an older one"):
        modelling_file_again()


@pytest.mark.slow  # compilation
@pytest.mark.parametrize("widths", WIDTHS)
def test_a_step_compiles_as_one_graph(widths):
    narrow = narrowed_to(tiny_llama("gqa"), *WIDTHS[widths])
    expected = decoded(narrow, "static")
    step = torch.compile(narrow, backend="aot_eager", fullgraph=True)
    cache = cache_of(narrow, "static")
    with torch.no_grad():
        narrow(input_ids=IDS[:, :8], **{CACHE: cache})
        actual = step(input_ids=IDS[:, 8:9], **{CACHE: cache}).logits
    assert_same(actual[:, 0], expected[:, 0])


def products_of_one(narrow, ids, cache=None, *, dynamic=False, grad=False, autocast=False) -> int:
    """How many products of one row the compiled model has."""
    found = []

    def backend(graph: torch.fx.GraphModule, inputs: list):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    step = torch.compile(narrow, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast):
        step(input_ids=ids, **({CACHE: cache} if cache else {}))
    return sum("product_of_one" in name for name in found)


@pytest.mark.slow  # compilation
@needs_mkl
def test_compiled_steps_divide_their_products_as_others_do():
    narrow = narrowed_to(tiny_llama("gqa"), 12, 7, 24)
    cache = cache_of(narrow, "static")
    with torch.no_grad():
        narrow(input_ids=IDS[:1, :8], **{CACHE: cache})
    one = IDS[:1, 8:9]
    assert products_of_one(narrow, one, cache) == 7 * 2 + 1
    assert products_of_one(narrow, one, grad=True) == products_of_one(narrow, one, autocast=True) == 0
    assert products_of_one(narrow, IDS[:1, :8]) == products_of_one(narrow, IDS[:1, :8], dynamic=True) == 0
    assert products_of_one(narrow.bfloat16(), one) == 0


@pytest.mark.slow  # compilation
def test_the_modelling_file_compiles_beside_a_copy_of_it(monkeypatch):
    narrow, one = narrowed_to(tiny_llama("gqa"), 12, 7, 24), IDS[:1, :1]
    module = modelling_file_again()  # as a checkpoint's own file is
    monkeypatch.setitem(sys.modules, module.__name__, module)
    again = module.TransActForCausalLM(narrow.config).eval()
    again.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        for model in (narrow, again, narrow):
            torch.compiler.reset()
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            assert_same(compiled(input_ids=one).logits, narrow(input_ids=one).logits)


def test_autocast_takes_the_modules_one_by_one():
    narrow = narrowed_to(tiny_llama("gqa"), 12, 7, 24)
    with torch.autocast("cpu", torch.bfloat16):
        steps = decoded(narrow)
    torch.testing.assert_close(steps.float(), decoded(narrow), rtol=0.2, atol=8)
