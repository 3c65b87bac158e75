"""The model and the pairs on which `peers.py` compares trainers: random weights in any size, rows of chosen lengths."""

import json
import random
import shutil
from collections.abc import Iterator
from os.path import commonprefix
from pathlib import Path

import torch
from fixture_model import load_tokenizer, token_ids, write_json, write_tokenizer
from fixture_texts import DIALOGUES, PAIRS, pair, texts_of
from safetensors.torch import save_file

ROWS = 32
SHORTEST, LONGEST = 50, 300
RANK, ALPHA = 8, 32
LONGEST_WORD = 8
INDEX = "model.safetensors.index.json"
LLAMA3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}


def shape_of(name: str) -> dict:
    """config.json's sizes: `llama3-8b-instruct`, or `tiny-HIDDEN-LAYERS` in about its proportions, with heads of 32."""
    if name == "llama3-8b-instruct":
        hidden, intermediate, layers, heads, key_value_heads = 4096, 14336, 32, 32, 8
    else:
        hidden, layers = (int(number) for number in name.removeprefix("tiny-").split("-"))
        assert hidden % 64 == 0, f"{name}: the hidden size is no multiple of 64"
        heads = hidden // 32
        intermediate, key_value_heads = hidden * 7 // 2, max(1, heads // 4)
    return LLAMA3 | {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": hidden // heads,
    }  # fmt: skip


def linears(shape: dict) -> dict[str, tuple[int, int]]:
    """A layer's linears and their shapes, `(out, in)`."""
    hidden, intermediate = shape["hidden_size"], shape["intermediate_size"]
    queries, keys = (shape["head_dim"] * shape[f"num_{heads}_heads"] for heads in ("attention", "key_value"))
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def make(folder: Path, shape_name: str, tokenizer: Path | None, max_length: int | None) -> None:
    """Writes folder/model, folder/adapter to start from, folder/pairs.jsonl and how many tokens each pair has.

    A model of that shape that is there already stays: other lengths take other pairs alone.
    """
    model_folder, shape = folder / "model", shape_of(shape_name)
    model_folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copyfile(tokenizer / name, model_folder / name)
    else:
        write_tokenizer(model_folder)
    loaded = load_tokenizer(model_folder)
    config = shape | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "attention_bias": False, "bos_token_id": loaded.bos_token_id,
        "eos_token_id": loaded.eos_token_id,
    }  # fmt: skip
    path = model_folder / "config.json"
    # The index is written when all weights are.
    has_weights = (model_folder / INDEX).exists() and json.loads(path.read_text()) == config
    if not has_weights:
        (model_folder / INDEX).unlink(missing_ok=True)
        write_json(path, config)
        write_weights(model_folder, shape)
    write_adapter(folder / "adapter", shape)

    rows = make_rows(loaded, max_length)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    tokens = [count_tokens(token_ids(loaded, row)) for row in rows]
    write_json(folder / "about.json", {"shape": shape_name, "max_length": max_length or LONGEST, "tokens": tokens})


def write_weights(folder: Path, shape: dict) -> None:
    """Random bf16 weights, a shard a layer, of which one is in memory at a time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the same seed draws other numbers on each
    generator = torch.Generator(device).manual_seed(0)
    shards = list(weight_shapes(shape))
    weight_map, total_size = {}, 0
    for number, shard in enumerate(shards, 1):
        tensors = {}
        for name, size in shard.items():
            if len(size) == 1:
                tensor = torch.ones(size, dtype=torch.bfloat16)
            else:
                tensor = torch.randn(size, dtype=torch.bfloat16, device=device, generator=generator)
                tensor = tensor.mul_(size[-1] ** -0.5).cpu()
            tensors[name] = tensor
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / INDEX, index)


def weight_shapes(shape: dict) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of each shard."""
    hidden, vocabulary = shape["hidden_size"], shape["vocab_size"]
    yield {"model.embed_tokens.weight": (vocabulary, hidden)}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    for layer in range(shape["num_hidden_layers"]):
        modules = linears(shape) | norms
        yield {f"model.layers.{layer}.{module}.weight": size for module, size in modules.items()}
    yield {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write_adapter(folder: Path, shape: dict) -> None:
    """The adapter that every trainer starts from, in PEFT's format; B is not zero, so that it counts from step 1."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for module, (n_out, n_in) in linears(shape).items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, n_in, generator=generator) * (3 * n_in) ** -0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(n_out, RANK, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "peers", "r": RANK,
        "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none",
        "target_modules": [module.split(".")[1] for module in linears(shape)],
    })  # fmt: skip


def make_rows(tokenizer, max_length: int | None) -> list[dict]:
    """Pairs whose prompt + answer have max_length tokens or a few less, half of it prompt; without it 50 to 300."""
    words = {word for row in PAIRS + DIALOGUES for text in texts_of(row) for word in text.split()}
    lengths = {word: len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in sorted(words)}
    lengths = {word: length for word, length in lengths.items() if length <= LONGEST_WORD}
    rng = random.Random(0)

    def text_of(tokens: int) -> str:
        """Words up to `tokens` tokens: no token spans two of them."""
        text = []
        while tokens >= LONGEST_WORD:
            text.append(rng.choice(list(lengths)))
            tokens -= lengths[text[-1]]
        return " ".join(text)

    shortest, longest = (max_length - 3 * LONGEST_WORD, max_length) if max_length else (SHORTEST, LONGEST)
    rows = []
    while len(rows) < ROWS:
        prompt = max_length // 2 if max_length else rng.randint(20, 120)
        query = text_of(prompt)
        used = len(token_ids(tokenizer, pair(query, "", ""))["chosen"])
        answers = [longest - used if max_length else rng.randint(20, longest - used) for _ in range(2)]
        row = pair(query, *(text_of(tokens) for tokens in answers))
        ids = token_ids(tokenizer, row)
        if all(shortest <= len(ids[answer]) <= longest for answer in ("chosen", "rejected")):
            rows.append(row)
    return rows


def count_tokens(ids: dict[str, list[int]]) -> dict[str, int]:
    """Tokens of both sequences, and those that orpo-wgpu computes: it packs a pair's common start once, and leaves the
    last token of each out, which predicts nothing."""
    chosen, rejected = ids["chosen"], ids["rejected"]
    common = len(commonprefix([chosen[:-1], rejected[:-1]]))
    return {"sequences": len(chosen) + len(rejected), "packed": len(chosen) + len(rejected) - 2 - common}
