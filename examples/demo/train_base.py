"""Train the demo's base model from nothing, on CPU or GPU, in the minutes it is given.

    python examples/demo/train_base.py --data ../shared/data/domains --minutes 60

A Llama of 5.8 M parameters (hidden 256, 6 layers, ffn 768, every linear dimension a multiple of
128) with its own byte-level BPE of 4,096 tokens. The text is not in this repository. `--data` is a
folder with one subfolder a domain, holding train.txt and valid.txt (documents separated by a line
`<|endoftext|>`). The committed weights were trained on:

    legal-us        US Code, 18 titles (public domain, divegeek/uscode)
    medical         MedQuAD, NIH questions and answers (CC BY 4.0, abachaa/MedQuAD)
    code-python     torchtitan, torchao, pytorch/examples, starlette, httpx, uvicorn, werkzeug (BSD-3)
    english-novels  12 novels of ELTeC-eng (public domain, COST-ELTeC/ELTeC-eng)
    tinystories     TinyStories samples (CDLA-Sharing-1.0, roneneldan/TinyStories)
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from maskllm.data import SEPARATOR, load_tokens, read_documents, sample, windows

# The share of each domain in a batch; stories are few and simple, so they repeat most.
MIX = {
    "legal-us": 0.22,
    "medical": 0.22,
    "code-python": 0.24,
    "english-novels": 0.18,
    "tinystories": 0.14,
}
LENGTH, BATCH = 512, 8
# MedQuAD's own words, which the base has read: a chat is questions with answers.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ {'user': 'Question: ', 'assistant': 'Answer: '}"
    ".get(message['role'], '') + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of domains")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--minutes", type=float, default=60, help="training time by the clock")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    tokenizer = train_tokenizer(args.data)
    train = {d: load_tokens(tokenizer, [str(args.data / d / "train.txt")]) for d in MIX}
    valid = {d: windows(load_tokens(tokenizer, [str(args.data / d / "valid.txt")]), LENGTH)[:24] for d in MIX}
    print("tokens:", {d: len(t) for d, t in train.items()})
    model = LlamaForCausalLM(config(tokenizer))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fit(model.to(device), train, valid, args.minutes * 60, args.lr, args.seed)

    # A model this small rambles at temperature 1; servers take these as their defaults.
    start = tokenizer.bos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=start, eos_token_id=start, do_sample=True, temperature=0.6, top_p=0.9
    )
    model.to("cpu", torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print("saved", args.out)


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def train_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE; `<|endoftext|>` begins and ends a document."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(read_documents(str(data / d / "train.txt") for d in MIX), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, bpe.token_to_id(SEPARATOR))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def fit(
    model: LlamaForCausalLM,
    train: dict[str, Tensor],
    valid: dict[str, Tensor],
    seconds: float,
    lr: float,
    seed: int,
) -> None:
    """Muon for the matrices, AdamW for the rest; the rate falls linearly to zero by the clock."""
    device = model.device
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    forward = torch.compile(model)
    noise = torch.Generator().manual_seed(seed)
    domains = torch.tensor(list(MIX.values()))
    step, shown, begin = 0, 0.0, time.monotonic()
    bar = tqdm(total=round(seconds), unit="s")
    while (elapsed := time.monotonic() - begin) < seconds:
        counts = torch.multinomial(domains, BATCH, replacement=True, generator=noise).bincount(minlength=5)
        x = torch.cat(
            [sample(t, LENGTH, int(n), noise) for t, n in zip(train.values(), counts, strict=True)]
        ).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 50) * (1 - elapsed / seconds)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        bar.n = round(elapsed)
        bar.set_postfix(step=step, loss=f"{loss.item():.3f}")
        if elapsed - shown > 300:
            shown = elapsed
            bar.write(f"step {step}: {perplexities(model, valid)}")
    bar.close()
    print(f"{step} steps of {BATCH} x {LENGTH}: {perplexities(model, valid)}")


@torch.no_grad()
def perplexities(model: LlamaForCausalLM, valid: dict[str, Tensor]) -> dict[str, float]:
    """Validation perplexity of each domain on its first 24 windows."""
    valid = {domain: x[:, :-1].to(model.device) for domain, x in valid.items()}
    with torch.autocast(model.device.type, torch.bfloat16):
        losses = {d: model(x, labels=x).loss for d, x in valid.items()}
    return {d: round(math.exp(loss.item()), 2) for d, loss in losses.items()}


if __name__ == "__main__":
    main()
