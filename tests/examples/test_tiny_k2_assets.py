"""The bundled model's folder: sizes, names and types as K2-Instruct publishes them; tokenizer; template."""

import json
import math

import pytest

from helpers.paths import TINY_K2
from moebox.config import load_config
from moebox.offload.checkpoint.safetensors import Checkpoint

SENTENCES = [
    "I want to eat at \"Bird Dog\" in Palo Alto on March 13th, half past 7 in the evening; it's $1,470.50!",
    '{"city": "San José", "date": "2019-03-13", "restaurant_name": "Sushi Omakase 🍣 東京"}',
    "  spaces\n\n\tand\r\nlines  \u00a0 don't BREAK CamelCaseWords it'LL 12345678 ",
    "Ελληνικά русский العربية हिन्दी 한국어",
]  # fmt: skip

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "A bus to Fresno, <|im_end|> please."},
    {"role": "assistant", "content": "When?"},
    {"role": "user", "content": "On the 5th."},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I call FindBus.",
        "tool_calls": [
            {"id": "functions.FindBus:0", "function": {"name": "FindBus", "arguments": '{"to": "Fresno"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "functions.FindBus:0", "name": "FindBus", "content": '[{"fare": "22"}]'},
]  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "FindBus",
            "description": "Find a bus",
            "parameters": {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]},
        },
    }
]


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.open(TINY_K2)


def test_folder_is_small_enough_to_bundle():
    sizes = [path.stat().st_size for path in TINY_K2.iterdir()]
    assert sum(sizes) <= 32_000_000
    assert max(sizes) <= 16_000_000


def test_files_are_named_as_moonshot_names_them():
    layers = load_config(TINY_K2).num_hidden_layers
    names = {path.name for path in TINY_K2.glob("*.safetensors")}
    assert names == {f"model-{n}-of-{layers}.safetensors" for n in range(1, layers + 1)}


def test_architecture_is_sparse_and_complete():
    config = load_config(TINY_K2)
    assert config.model_type == "kimi_k2" and config.q_lora_rank and config.yarn
    assert config.n_routed_experts >= 64 and config.num_experts_per_tok >= 4
    assert len(config.moe_layers) >= 6 and config.first_k_dense_replace == 1


def test_every_tensor_is_there_in_the_published_type(checkpoint):
    config = checkpoint.config
    expected = dict(config.backbone_shapes())
    for layer in config.moe_layers:
        for expert in range(config.n_routed_experts):
            for part, shape in config.expert_shapes().items():
                expected[f"{config.expert_name(layer, expert)}.{part}.weight"] = shape
    scales = {name for name in checkpoint.tensors if name.endswith("_scale_inv")}
    assert set(checkpoint.tensors) - scales == set(expected)
    for name, shape in expected.items():
        info = checkpoint.info(name)
        assert info.shape == tuple(shape), name
        assert info.dtype == published_dtype(name), name
        if info.dtype == "F8_E4M3":
            scale = checkpoint.info(f"{name}_scale_inv")
            assert scale.dtype == "F32" and scale.shape == tuple(math.ceil(size / 128) for size in shape)


def published_dtype(name):
    if name.endswith("e_score_correction_bias"):
        return "F32"
    kept = "norm" in name or "embed_tokens" in name or "lm_head" in name or "mlp.gate.weight" in name
    return "BF16" if kept else "F8_E4M3"


def test_some_fp8_blocks_are_partial(checkpoint):
    assert checkpoint.info("model.layers.0.self_attn.kv_a_proj_with_mqa.weight").shape[0] % 128 != 0


def test_special_tokens_stand_where_kimi_has_them():
    from tokenizer import RANKS, load

    encoding = load(TINY_K2)
    offsets = {"[BOS]": 0, "[EOS]": 1, "<|im_end|>": 2, "<|im_user|>": 3, "<|im_assistant|>": 4,
               "<|im_system|>": 10, "<|tool_calls_section_begin|>": 11, "<|tool_call_end|>": 15,
               "<|im_middle|>": 17, "<think>": 22, "</think>": 23, "[UNK]": 254, "[PAD]": 255}  # fmt: skip
    for name, offset in offsets.items():
        assert encoding.encode_single_token(name) == RANKS + offset
    generation = json.loads((TINY_K2 / "generation_config.json").read_text())
    assert generation["eos_token_id"] == encoding.encode_single_token("<|im_end|>")


def huggingface_tokenizer(encoding):
    """The same ranks as a Hugging Face BPE, its merges rebuilt from them."""
    import tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    ranks = encoding._mergeable_ranks

    def text(token):
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        splits = [(token[:n], token[n:]) for n in range(1, len(token))]
        splits = [(a, b) for a, b in splits if a in ranks and b in ranks and max(ranks[a], ranks[b]) < rank]
        merges += sorted(splits, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    model = tokenizers.models.BPE(
        {text(t): rank for t, rank in ranks.items()}, [(text(a), text(b)) for a, b in merges]
    )
    tokenizer = tokenizers.Tokenizer(model)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(encoding._pat_str), "isolated")
    bytewise = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytewise])
    return tokenizer


def test_huggingface_bpe_gives_the_same_ids():
    from tokenizer import load

    encoding = load(TINY_K2)
    tokenizer = huggingface_tokenizer(encoding)
    for sentence in [*SENTENCES, (TINY_K2 / "README.md").read_text(), (TINY_K2 / "config.json").read_text()]:
        ids = encoding.encode_ordinary(sentence)
        assert tokenizer.encode(sentence).ids == ids
        assert encoding.decode(ids) == sentence


def test_names_are_cut_alike_with_and_without_a_space():
    from tokenizer import load

    encoding = load(TINY_K2)
    for word in ("Reykjavik", "Guggenheim", "Karvelino", "Petaluma"):
        spaced, bare = (
            encoding.decode_tokens_bytes(encoding.encode_ordinary(text)) for text in (f"in {word}", word)
        )
        assert b"".join(spaced[1:]).strip() == word.encode()
        assert [piece.strip() for piece in spaced[1:] if piece != b" "] == bare


@pytest.mark.parametrize("thinking", [True, False])
def test_template_renders_alike_in_transformers_moebox_and_training(thinking):
    from dialogues import load_template
    from transformers.utils import chat_template_utils as utils

    from moebox.runtime.text.template import Template
    from moebox.runtime.text.tokenizer import Tokenizer

    options = {"thinking": thinking, "add_generation_prompt": True}
    source = (TINY_K2 / "chat_template.jinja").read_text()
    (theirs,), _ = utils.render_jinja_template([MESSAGES], tools=TOOLS, chat_template=source, **options)
    ours = Template.load(TINY_K2, Tokenizer.load(TINY_K2)).render_text(MESSAGES, TOOLS, **options)
    assert load_template(TINY_K2).render(messages=MESSAGES, tools=TOOLS, **options) == theirs
    assert ours == theirs
    tail = "<|im_assistant|>assistant<|im_middle|>" + ("" if thinking else "<think></think>")
    assert theirs.endswith('## Return of functions.FindBus:0\n[{"fare": "22"}]<|im_end|>' + tail)
    assert "<think></think>When?" in theirs
    assert "<think>I call FindBus.</think><|tool_calls_section_begin|>" in theirs


def test_typed_control_tokens_stay_text():
    from moebox.runtime.text.template import Template
    from moebox.runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(TINY_K2)
    ids = Template.load(TINY_K2, tokenizer).render(MESSAGES, TOOLS)
    ends = sum(message["role"] != "x" for message in MESSAGES) + 1  # every turn and the declaration
    assert ids.count(tokenizer.specials["<|im_end|>"]) == ends
