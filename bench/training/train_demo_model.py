"""Train the demo language model that ships with paged_kv.

A small Llama (grouped-query attention, head_dim 64, context 1024) learns English prose from a
folder of plain-text books, one of them held out. Every training window starts with the BOS token,
so attention sinks form at position 0 as they do in large models. The checkpoint with the lowest
held-out loss is written as a Hugging Face model folder: `model.safetensors` in bfloat16,
`tokenizer.json`, the configurations and a model card.

    PYTHONPATH=bench python bench/training/train_demo_model.py \
        --books BOOKS_FOLDER --output paged_kv/demo_model

Knows the corpus and the recipe, never anything about paged_kv: the result is an ordinary model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS = "<|bos|>"
CONTEXT = 1024


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the result besides the text."""

    steps: int = 2600
    batch_size: int = 4
    muon_lr: float = 0.02
    adamw_lr: float = 0.004
    weight_decay: float = 0.1
    dropout: float = 0.1
    warmup_steps: int = 50
    cooldown_fraction: float = 0.6
    seed: int = 0


def read_book(path: Path) -> str:
    """The book as running text: one sentence a line in the file, paragraphs kept apart."""
    paragraphs = path.read_text(encoding="utf-8").split("\n\n")
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts BOS in front of whatever it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=CONTEXT
    )


def build_model(vocab_size: int, bos_id: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=bos_id,
        eos_token_id=bos_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def add_residual_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Llama has no residual dropout; a small corpus read many times needs one."""

    def drop(module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, probability, training=module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def windows(tokens: torch.Tensor, bos_id: int, starts: torch.Tensor) -> torch.Tensor:
    """BOS and the `CONTEXT` tokens after each start: [len(starts), CONTEXT + 1]."""
    body = tokens[starts[:, None] + torch.arange(CONTEXT)]
    return torch.cat([torch.full((len(starts), 1), bos_id), body], dim=1)


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(
    model: LlamaForCausalLM, tokens: torch.Tensor, bos_id: int, max_windows: int | None = None
) -> float:
    """Mean loss in nats a token over consecutive windows of the held-out book."""
    model.eval()
    starts = torch.arange(0, len(tokens) - CONTEXT, CONTEXT)[:max_windows]
    losses = [loss_of(model, windows(tokens, bos_id, part)).item() for part in starts.split(8)]
    model.train()
    return sum(losses) / len(losses)


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, linear cool-down to zero."""
    cooldown_start = recipe.steps * (1 - recipe.cooldown_fraction)
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if step < cooldown_start:
        return 1.0
    return (recipe.steps - step) / (recipe.steps - cooldown_start)


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    model: LlamaForCausalLM,
    train_tokens: torch.Tensor,
    held_out_tokens: torch.Tensor,
    bos_id: int,
    recipe: Recipe,
    output: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[int, float]:
    """Run the recipe; the best checkpoint lies in `output`. Returns its step and held-out loss."""
    optimizers = make_optimizers(model, recipe)
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(recipe.seed)
    best_step, best_loss, started = 0, math.inf, time.perf_counter()
    for step in range(recipe.steps):
        factor = learning_rate_factor(step, recipe)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, base_rate in zip(groups, base_rates, strict=True):
            group["lr"] = base_rate * factor
        starts = torch.randint(
            len(train_tokens) - CONTEXT, (recipe.batch_size,), generator=generator
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, windows(train_tokens, bos_id, starts))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        last = step + 1 == recipe.steps
        if (step + 1) % 100 == 0 or last:
            held_out = held_out_loss(model, held_out_tokens, bos_id, None if last else 24)
            tokens_seen = (step + 1) * recipe.batch_size * CONTEXT
            print(
                f"step {step + 1}: train {loss.item():.4f}, held out {held_out:.4f} nats, "
                f"epoch {tokens_seen / len(train_tokens):.2f}, "
                f"{tokens_seen / (time.perf_counter() - started):.0f} tokens/s",
                flush=True,
            )
            if held_out < best_loss:
                best_step, best_loss = step + 1, held_out
                save(model, tokenizer, output)
    return best_step, best_loss


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the folder in bfloat16 and leave the model being trained in float32."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--held-out", default="austen-persuasion", help="book kept for testing")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps)

    books = {path.stem: read_book(path) for path in sorted(arguments.books.glob("*.txt"))}
    held_out_text = books.pop(arguments.held_out)
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(list(books.values()), arguments.vocab_size)
    encode = tokenizer.backend_tokenizer.encode
    bos_id = tokenizer.bos_token_id
    train_ids: list[int] = []
    for text in books.values():
        train_ids += encode(text).ids  # each book opens with BOS
    held_out_ids = encode(held_out_text, add_special_tokens=False).ids
    model = build_model(len(tokenizer), bos_id)
    add_residual_dropout(model, recipe.dropout)
    print(
        f"{model.num_parameters() / 1e6:.2f} M parameters, {len(train_ids)} training tokens, "
        f"{len(held_out_ids)} held-out tokens, {len(held_out_text) / len(held_out_ids):.2f} "
        "characters a token",
        flush=True,
    )
    step, loss = train(
        model,
        torch.tensor(train_ids),
        torch.tensor(held_out_ids),
        bos_id,
        recipe,
        arguments.output,
        tokenizer,
    )
    result = {"best_step": step, "held_out_nats_per_token": loss, "recipe": asdict(recipe)}
    (arguments.output / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"best at step {step}: {loss:.4f} nats a token, perplexity {math.exp(loss):.2f}")


if __name__ == "__main__":
    main()
