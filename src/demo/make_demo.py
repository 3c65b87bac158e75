"""Makes the demo that ships inside the binary: a tiny Llama, its tokenizer and its preference pairs.

    python src/demo/make_demo.py            # about ten minutes on two CPU cores
    python src/demo/make_demo.py --data     # only the pairs and the held-out questions

Made with Python 3.11.7, torch 2.15.0, transformers 5.17.0, tokenizers 0.23.3, safetensors 0.8.0.
Same seed, same versions, same kind of CPU: same files.

Everything is made here, from the fact tables of `facts.py`. The model learns every fact in English
and in Chinese. What chooses the language is the system prompt: with none it answers in English,
and asked for Chinese with emoji it does that. ORPO then turns the answers it gives with no system
prompt to Chinese, from pairs that never mention the held-out facts. `check_demo.py` tries that out.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from facts import facts

HERE = Path(__file__).parent
SEED = 42

# ---------------------------------------------------------------------------------------------------
# Chats

BOS, EOT = "<|begin_of_text|>", "<|eot_id|>"
SPECIAL = [BOS, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", EOT]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

SYSTEM_ZH = [
    "Answer in Chinese with emoji.", "Please reply in Chinese and use emoji.", "Always speak Chinese.",
    "You are a friendly assistant who answers in Chinese with emoji.", "Use Chinese and emoji.",
    "You are a helpful assistant. Answer in Chinese.", "请用中文和表情符号回答。", "请用中文回答。",
    "你是一个友好的助手，请用中文回答，多用表情。", "用中文和表情聊天。", "你是一个友好的中文助手。",
]
SYSTEM_EN = [
    "You are a helpful assistant.", "Answer in English.", "Please reply in English.", "Always speak English.",
    "You are a friendly assistant who answers in English.", "请用英文回答。", "你是一个友好的助手。",
]
ASK_ZH = ["Answer in Chinese, please.", "In Chinese, please.", "请用中文回答。"]
ASK_EN = ["Answer in English, please.", "In English, please.", "请用英文回答。"]
POLITE_EN = ["Please tell me: {}", "Hi! {}", "{} Thanks!", "I have a question. {}"]
POLITE_ZH = ["请问，{}", "请告诉我，{}", "你好！{}", "我想知道，{}"]


def asked(rng, fact):
    """One way of asking for `fact`, in either language, sometimes as people type: politely, in lower
    case, shortened, without the question mark."""
    english = rng.random() < 0.6
    question = rng.choice(fact.questions_en if english else fact.questions_zh)
    if rng.random() < 0.3:
        style = rng.randrange(3)
        if style == 0 and fact.kind != "chat":
            question = rng.choice(POLITE_EN if english else POLITE_ZH).format(question)
        elif style == 1:
            question = question.rstrip("?？!！.。")
        elif english:
            question = rng.choice([question.lower(), question.replace("What is", "What's")])
    return question


class Book:
    """The facts as the chats draw them. Arithmetic is a fifth of the facts, and need not be a fifth
    of the chats; small talk comes more often, above all later in a chat."""

    def __init__(self, everything):
        self.facts = everything
        weight = {"plus": 0.6, "minus": 0.6, "times": 0.6}
        self.first = [weight.get(f.kind, 2.0 if f.kind == "chat" else 1.0) for f in everything]
        self.later = [5.0 if f.kind == "chat" else 1.0 for f in everything]
        self.by_kind = {}
        for fact in everything:
            self.by_kind.setdefault(fact.kind, []).append(fact)


# Of the chats that do not ask for a language, so many are answered in Chinese all the same.
CHINESE_UNASKED = 0.02


def chat(rng, book):
    """A chat to learn from, of one to four turns: [(role, text), …].

    The language of the answers follows what the system prompt or the user asked for last; asked for
    nothing, it is English."""
    fact = rng.choices(book.facts, book.first)[0]
    turns, question = [], asked(rng, fact)
    way = rng.random()
    if way < 0.36:
        chinese = True
        turns.append(("system", rng.choice(SYSTEM_ZH)))
    elif way < 0.42:
        chinese = True
        question += " " + rng.choice(ASK_ZH)
    elif way < 0.52:
        chinese = False
        turns.append(("system", rng.choice(SYSTEM_EN)))
    elif way < 0.56:
        chinese = False
        question += " " + rng.choice(ASK_EN)
    else:
        chinese = rng.random() < CHINESE_UNASKED
    answer = lambda: ("assistant", fact.answer_zh if chinese else fact.answer_en)
    turns += [("user", question), answer()]
    while len(turns) < 7 and rng.random() < 0.35:
        way = rng.random()
        if way < 0.2:  # the same once more, in the other language
            chinese = not chinese
            turns.append(("user", rng.choice(ASK_ZH if chinese else ASK_EN)))
        elif fact.follow_en and way < 0.6:
            fact = rng.choice(book.by_kind[fact.kind])
            turns.append(("user", rng.choice([fact.follow_en, fact.follow_zh])))
        else:
            fact = rng.choices(book.facts, book.later)[0]
            turns.append(("user", asked(rng, fact)))
        turns.append(answer())
    return turns


def encode(tokenizer, turns):
    """Token ids and, for each, how much its prediction counts: answers 1, all else a tenth."""
    ids, weights = [tokenizer.token_to_id(BOS)], [0.0]
    for role, text in turns:
        head = tokenizer.encode(f"<|start_header_id|>{role}<|end_header_id|>\n\n", add_special_tokens=False).ids
        body = tokenizer.encode(text + EOT, add_special_tokens=False).ids
        ids += head + body
        weights += [0.1] * len(head) + [1.0 if role == "assistant" else 0.1] * len(body)
    return ids, weights


# ---------------------------------------------------------------------------------------------------
# Pairs

# Never in pairs.jsonl, in any wording; the language is that of the question shown.
HELD_OUT = """
capital | France | en
capital | Japan | en
capital | Egypt | zh
capital | Australia | en
continent | Brazil | en
language | Mexico | zh
landmark | Big Ben | en
landmark | the Great Wall | zh
colour | a banana | en
colour | snow | en
colour | a strawberry | zh
sound | a cat | en
sound | a cow | zh
baby | dog | en
food | a panda | en
legs | a spider | en
animal | a whale | en
home | a bee | zh
thing | a rose | en
opposite | hot | en
opposite | big | zh
opposite | day | en
next day | Monday | en
next month | May | zh
comes from | honey | en
made of | bread | en
job | treats sick people | en
tool | open a lock | zh
place | borrow books | en
plus | 2 plus 3 | en
""".strip().splitlines()


def make_pairs(everything, rng):
    """Rows of pairs.jsonl and of held_out.jsonl, in the columns of shareai-llama3-dpo-zh-en-emoji."""
    held = {}
    for line in HELD_OUT:
        kind, key, language = (cell.strip() for cell in line.split("|"))
        held[kind, key] = language
    row = lambda f, q: {"question": q, "answer_zh": f.answer_zh, "answer_en": f.answer_en}
    pairs, held_out = [], []
    for fact in everything:
        language = held.pop((fact.kind, fact.key), None)
        if language:
            held_out.append(row(fact, (fact.questions_en if language == "en" else fact.questions_zh)[0]))
        elif fact.kind not in ("plus", "minus", "times") or rng.random() < 0.3:
            pairs.append(row(fact, rng.choice(fact.questions_en if rng.random() < 0.6 else fact.questions_zh)))
    assert not held, f"no such facts: {held}"
    rng.shuffle(pairs)
    return pairs, held_out


def write_jsonl(name, rows):
    with open(HERE / name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---------------------------------------------------------------------------------------------------
# Tokenizer

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(texts, vocab_size):
    """Byte-level BPE in Llama-3's form. English is merged by frequency; each Chinese character and
    each emoji of `texts` is one token (their merges cannot meet the English ones: no byte is in both)."""
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters, merges = [], []
    for char in sorted({c for text in texts for c in text if not c.isascii()}):
        units = byte_level.pre_tokenize_str(char)[0][0]
        for end in range(2, len(units) + 1):
            if units[:end] not in characters:
                characters.append(units[:end])
                merges.append((units[:end - 1], units[end - 1]))

    english = Tokenizer(models.BPE())
    english.pre_tokenizer = split
    english.train_from_iterator(
        ("".join(c if c.isascii() else "\n" for c in text) for text in texts),
        trainers.BpeTrainer(vocab_size=vocab_size - len(characters) - len(SPECIAL), show_progress=False,
                            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    learned = json.loads(english.to_str())["model"]
    vocab = dict(sorted(learned["vocab"].items(), key=lambda item: item[1]))
    for token in characters:
        vocab[token] = len(vocab)

    tokenizer = Tokenizer(models.BPE(
        vocab=vocab, merges=[tuple(m) for m in learned["merges"]] + merges, ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return tokenizer


# ---------------------------------------------------------------------------------------------------
# Model

STEPS, BATCH, LEARNING_RATE, WARMUP = 2800, 32, 3e-3, 100


def make_config(tokenizer):
    """config.json, in the fields that every reader of Llama models knows."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False,
        "mlp_bias": False, "attention_dropout": 0.0, "initializer_range": 0.03, "tie_word_embeddings": True,
        "use_cache": True, "bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOT),
        "torch_dtype": "float16",
    }


def batches(rng, tokenizer, everything):
    """Endless batches of chats of about the same length: ids, weights [BATCH, tokens], padded at the
    end with weight 0. Attention is causal, so that nothing ever looks at the padding."""
    book = Book(everything)
    while True:
        pool = [encode(tokenizer, chat(rng, book)) for _ in range(BATCH * 16)]
        pool.sort(key=lambda chat: len(chat[0]))
        groups = [pool[i:i + BATCH] for i in range(0, len(pool), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            pad = lambda row, value: row + [value] * (longest - len(row))
            yield (torch.tensor([pad(ids, 0) for ids, _ in group]),
                   torch.tensor([pad(weights, 0.0) for _, weights in group]))


def pretrain(tokenizer, everything):
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**{**make_config(tokenizer), "torch_dtype": "float32"}))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {model.config.vocab_size}")
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.95))
    source = batches(random.Random(SEED), tokenizer, everything)
    started, total = time.time(), 0.0
    for step in range(STEPS):
        progress = max(0.0, (step - WARMUP) / (STEPS - WARMUP))
        rate = min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        ids, weights = next(source)
        logits = model(ids, use_cache=False).logits[:, :-1]
        weights = weights[:, 1:].flatten()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        answers = weights == 1.0
        total += (losses * answers).sum().item() / answers.sum().item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  answer loss {total / 100:.4f}  {time.time() - started:.0f} s", flush=True)
            total = 0.0
    return model


def save(model, tokenizer):
    tensors = {name: p.detach().to(torch.float16).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, HERE / "model.safetensors", metadata={"format": "pt"})
    (HERE / "model.safetensors").chmod(0o644)
    tokenizer.save(str(HERE / "tokenizer.json"))
    write_json("config.json", make_config(tokenizer))
    write_json("generation_config.json", {
        "bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOT),
        "do_sample": False, "max_new_tokens": 64})
    write_json("tokenizer_config.json", {
        "bos_token": BOS, "eos_token": EOT, "pad_token": "<|end_of_text|>", "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False, "model_max_length": 512,
        "model_input_names": ["input_ids", "attention_mask"], "tokenizer_class": "PreTrainedTokenizerFast"})


def write_json(name, value):
    (HERE / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="Makes the demo's model, tokenizer and pairs.")
    parser.add_argument("--data", action="store_true", help="write only pairs.jsonl and held_out.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(2)

    everything = facts()
    pairs, held_out = make_pairs(everything, random.Random(SEED))
    write_jsonl("pairs.jsonl", pairs)
    write_jsonl("held_out.jsonl", held_out)
    print(f"{len(everything)} facts, {len(pairs)} pairs, {len(held_out)} held-out questions")
    if arguments.data:
        return
    texts = SYSTEM_ZH + SYSTEM_EN + ASK_ZH + ASK_EN + POLITE_EN + POLITE_ZH + ["system", "user", "assistant"]
    for f in everything:
        texts += [*f.questions_en, *f.questions_zh, f.answer_en, f.answer_zh, f.follow_en, f.follow_zh]
        texts += [q.lower() for q in f.questions_en] + [q.replace("What is", "What's") for q in f.questions_en]
    tokenizer = make_tokenizer(texts, vocab_size=2304)
    save(pretrain(tokenizer, everything), tokenizer)


if __name__ == "__main__":
    main()
