"""Teach the demo model attention sinks, as large models have: an adapter of a few hundred KB.

The demo model is too small to have formed sinks of its own: it loses nothing when its first tokens
are evicted, so it cannot show what sinks are for. Low-rank changes of its attention matrices are
trained with one more term in the loss: heads that give BOS less than `SINK_SHARE` of their
attention pay for it. `bench_windowed.py --adapter` applies them.

    PYTHONPATH=bench python bench/training/train_sink_adapter.py \
        --books FOLDER --output bench/training/sink_adapter.safetensors
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from training.train_demo_model import read_book, windows
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from paged_kv.entrypoints.demo import MODEL_FOLDER

RANK = 8
SINK_SHARE = 0.6  # of each head's attention, from the second token on
BATCH_SIZE, NUM_STEPS, LEARNING_RATE = 2, 400, 2e-3


class LowRank(nn.Module):
    """A matrix and a low-rank change of it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(RANK, columns) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def attention_matrices(model: PreTrainedModel) -> dict[str, nn.Module]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return {name: m for name, m in model.named_modules() if name.endswith(names)}


def apply_adapter(model: PreTrainedModel, adapter: Path) -> None:
    """Add an adapter's changes to a model's matrices."""
    changes = load_file(adapter)
    with torch.no_grad():
        for name, module in attention_matrices(model).items():
            change = changes[f"{name}.up"].float() @ changes[f"{name}.down"].float()
            module.weight.add_(change.to(module.weight.dtype))


def losses(model: PreTrainedModel, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the next tokens; of heads that give BOS too little; and the share that BOS gets."""
    out = model(batch[:, :-1], use_cache=False, output_attentions=True)
    text = functional.cross_entropy(out.logits.flatten(0, 1).float(), batch[:, 1:].flatten())
    shares = torch.stack([attention[:, :, 1:, 0].float() for attention in out.attentions])
    return text, (SINK_SHARE - shares).relu().mean(), shares.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--books", type=Path, required=True, help="folder of plain text")
    parser.add_argument("--held-out", default="austen-persuasion.txt")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype="float32", attn_implementation="eager"
    )
    books = [
        book for book in sorted(arguments.books.glob("*.txt")) if book.name != arguments.held_out
    ]
    tokens = torch.tensor(
        [t for book in books for t in tokenizer.encode(read_book(book), add_special_tokens=False)]
    )
    model.requires_grad_(False)
    for module in attention_matrices(model).values():
        parametrize.register_parametrization(module, "weight", LowRank(module.weight))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, NUM_STEPS)
    started = time.perf_counter()
    for step in range(NUM_STEPS):
        starts = torch.randint(len(tokens) - 1024, (BATCH_SIZE,))
        batch = windows(tokens, tokenizer.bos_token_id, starts)
        text, missing, share = losses(model, batch)
        (text + 2 * missing).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 20 == 0:
            seconds = (time.perf_counter() - started) / (step + 1)
            print(
                f"step {step + 1}: {text.item():.3f} nats, BOS gets {share.item():.3f}, "
                f"{seconds:.2f} s a step",
                flush=True,
            )
    changes = {}
    for name, module in attention_matrices(model).items():
        (change,) = module.parametrizations.weight
        changes[f"{name}.up"] = change.up.detach().bfloat16().contiguous()
        changes[f"{name}.down"] = change.down.detach().bfloat16().contiguous()
    save_file(changes, arguments.output)


if __name__ == "__main__":
    main()
