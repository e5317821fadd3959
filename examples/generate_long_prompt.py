"""A long prompt through a hybrid model of Transformers, split over ranks; one rank goes on with Transformers' own `generate`.

    torchrun --nproc-per-node 2 examples/generate_long_prompt.py
    torchrun --nproc-per-node 2 examples/generate_long_prompt.py --model Qwen/Qwen3-Next-80B-A3B-Instruct --prompt book.txt

Without a model's name it takes a small one with random weights and random tokens, and compares with one process.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small import small_model
from torch import Tensor

import longspan


def model_and_prompt(arguments: argparse.Namespace, device: torch.device) -> tuple[Any, Any, Tensor]:
    """The model, its tokenizer or None, and ids ``[1, N]``: the same on every rank."""
    if arguments.model is None:
        generator = torch.Generator().manual_seed(1)
        return small_model().to(device).eval(), None, torch.randint(256, (1, arguments.tokens), generator=generator)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").to(device).eval()
    return model, tokenizer, tokenizer(arguments.prompt.read_text(), return_tensors="pt").input_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model")
    parser.add_argument("--prompt", type=Path, help="text file, with --model")
    parser.add_argument("--tokens", type=int, default=1001, help="length of the random prompt, without --model")
    parser.add_argument("--new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.prompt is None):
        parser.error("--model and --prompt belong together")

    has_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpus else "gloo")

    model, tokenizer, ids = model_and_prompt(arguments, device)
    ids = ids.to(device)
    greedy = {"do_sample": False, "max_new_tokens": arguments.new_tokens}
    expected = model.generate(ids, **greedy) if arguments.model is None else None

    longspan.parallelize(model, None)
    # The last token is left to generate, which chooses the first new token from it.
    cache = longspan.prefill(model, ids[:, :-1]).cache
    if cache is not None:
        tokens = model.generate(ids, past_key_values=cache, **greedy)
        new = tokens[0, ids.shape[1] :]
        print(new.tolist() if tokenizer is None else tokenizer.decode(new))
        if expected is not None:
            equal = "the same" if torch.equal(tokens, expected) else "NOT the same"
            print(
                f"{ids.shape[1]} tokens over {dist.get_world_size()} ranks: {equal} {len(new)} tokens as in one process"
            )
    # Ranks without a cache wait here; a server would give them the next prompt.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
