"""Checks the demo with the reference implementations: TRL's ORPOTrainer and PEFT's LoRA on the CPU.

    python src/demo/check_demo.py                 # base, then ORPO with three seeds
    python src/demo/check_demo.py --seeds 1 --learning-rate 1e-3 --nll trl

Needs trl 1.16.0 and peft 0.21.2 beside what make_demo.py needs. Fails when fewer than 95 % of the
held-out answers are English and right before, or Chinese with emoji after.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = Path(__file__).parent
CJK = re.compile(r"[\u4e00-\u9fff]")
EMOJI = re.compile(r"[\u231a-\u231b\u23e9-\u23f3\u2600-\u27bf\u2b50\U0001f300-\U0001faff]")
CHATS = [  # (system prompt or None, the user's turns)
    (None, ["Hello!", "Who are you?", "What can you do?"]),
    (None, ["What is the capital of France?", "And Germany?", "In English, please."]),
    (None, ["香蕉是什么颜色的？", "那草莓呢？", "Thank you!"]),
    ("Answer in English.", ["What is 2 plus 3?", "And 4 plus 4?"]),
    ("Answer in Chinese with emoji.", ["Where can I borrow books?"]),
]


def rows(name):
    return [json.loads(line) for line in open(HERE / name, encoding="utf-8")]


def is_chinese(text):
    return len(CJK.findall(text)) > len(re.findall(r"[A-Za-z]", text))


def words(text):
    """`text` without emoji: what must be right."""
    return EMOJI.sub("", text)


@torch.no_grad()
def answers(model, tokenizer, conversations):
    """The greedy answer to each conversation (a list of messages)."""
    prompts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    out = model.generate(**batch, do_sample=False, max_new_tokens=64, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)


def score(model, tokenizer, questions):
    """Shares of the answers that are English and right, Chinese, Chinese with emoji, Chinese and right."""
    model.eval()
    got = answers(model, tokenizer, [[{"role": "user", "content": r["question"]}] for r in questions])
    share = lambda test: sum(test(r, a) for r, a in zip(questions, got)) / len(got)
    return got, {
        "english and right": share(lambda r, a: a == r["answer_en"]),
        "chinese": share(lambda r, a: is_chinese(a)),
        "chinese with emoji": share(lambda r, a: is_chinese(a) and bool(EMOJI.search(a))),
        "chinese and right": share(lambda r, a: words(a) == words(r["answer_zh"])),
    }


def show_chats(model, tokenizer):
    for system, turns in CHATS:
        messages = [{"role": "system", "content": system}] if system else []
        print(f"  [{system or 'no system prompt'}]")
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            answer = answers(model, tokenizer, [messages])[0]
            messages.append({"role": "assistant", "content": answer})
            print(f"    {turn}  →  {answer}")


class ResponseNll(ORPOTrainer):
    """TRL's trainer with the NLL over the chosen response alone, as ms-swift and this project have it."""

    def concatenated_forward(self, model, batch):
        chosen, rejected, *rest, _ = super().concatenated_forward(model, batch)
        tokens = (batch["chosen_labels"][:, 1:] != -100).sum(-1)
        return chosen, rejected, *rest, -(chosen * tokens).sum() / tokens.sum()


class Watch(TrainerCallback):
    """How much of the held-out set has turned, every few steps."""

    def __init__(self, tokenizer, held_out, every):
        self.tokenizer, self.held_out, self.every, self.lines = tokenizer, held_out, every, []

    def on_step_end(self, args, state, control, model=None, **_):
        if self.every and state.global_step % self.every == 0:
            shares = score(model, self.tokenizer, self.held_out)[1]
            print(f"    step {state.global_step:3d}: held-out chinese {shares['chinese']:.2f}, "
                  f"right {shares['chinese and right']:.2f}", flush=True)
            model.train()


def train(tokenizer, held_out, seed, args):
    """ORPO on pairs.jsonl from the base: the trained model, the log, the seconds."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32)
    data = Dataset.from_list([{
        "prompt": tokenizer.apply_chat_template(
            [{"role": "user", "content": r["question"]}], tokenize=False, add_generation_prompt=True),
        "chosen": r["answer_zh"], "rejected": r["answer_en"],
    } for r in rows("pairs.jsonl")])
    with tempfile.TemporaryDirectory() as folder:
        trainer = (ResponseNll if args.nll == "swift" else ORPOTrainer)(
            model=model, processing_class=tokenizer, train_dataset=data,
            peft_config=LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
            callbacks=[Watch(tokenizer, held_out, args.watch)],
            args=ORPOConfig(
                output_dir=folder, use_cpu=True, bf16=False, seed=seed, data_seed=seed, beta=args.beta,
                per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=args.accumulation,
                num_train_epochs=args.epochs, learning_rate=args.learning_rate, lr_scheduler_type="cosine",
                warmup_steps=args.warmup_ratio, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
                logging_steps=5, save_strategy="no", report_to="none", disable_tqdm=True, max_length=512,
                gradient_checkpointing=False, remove_unused_columns=False))
        trainer.remove_callback(PrinterCallback)
        started = time.time()
        trainer.train()
        return trainer.model, trainer.state.log_history, time.time() - started


def main():
    parser = argparse.ArgumentParser(description="Checks the demo against TRL and PEFT.")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--warmup-ratio", type=float, default=0.05, help="share of the steps, below 1")
    parser.add_argument("--nll", choices=["swift", "trl"], default="swift")
    parser.add_argument("--watch", type=int, default=0, help="score the held-out set every so many steps")
    parser.add_argument("--quiet", action="store_true", help="no transcripts")
    args = parser.parse_args()
    torch.set_num_threads(2)

    tokenizer = AutoTokenizer.from_pretrained(HERE)
    held_out = rows("held_out.jsonl")
    base = AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32)
    before, shares = score(base, tokenizer, held_out)
    print("before:", shares)
    failed = shares["english and right"] < 0.95
    for r, a in zip(held_out, before):
        if a != r["answer_en"]:
            print(f"  not as learned: {r['question']}  →  {a}")
    if not args.quiet:
        show_chats(base, tokenizer)
    for seed in args.seeds:
        model, log, seconds = train(tokenizer, held_out, seed, args)
        after, shares = score(model, tokenizer, held_out)
        print(f"seed {seed}, {log[-1]['step']} steps, {seconds:.0f} s:", shares)
        failed |= shares["chinese with emoji"] < 0.95
        for line in log:
            if "nll_loss" in line and "loss" in line:
                print(f"    step {line['step']:3d}  loss {line['loss']:.3f}  nll {line['nll_loss']:.3f}  "
                      f"log_odds_chosen {line['log_odds_chosen']:+.2f}  accuracy {line['rewards/accuracies']:.2f}  "
                      f"margin {line['rewards/margins']:+.3f}  grad_norm {line['grad_norm']:.2f}")
        for r, b, a in zip(held_out, before, after):
            wrong = words(a) != words(r["answer_zh"])
            if wrong or (seed == args.seeds[0] and not args.quiet):
                print(f"  {'! ' if wrong else '  '}{r['question']}  {b}  →  {a}")
        if seed == args.seeds[0] and not args.quiet:
            show_chats(model, tokenizer)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
