"""Transformers' Trainer with sequences shared by ranks: two lines more than without.

    torchrun --nproc-per-node 2 examples/finetune_trainer.py
    torchrun --nproc-per-node 4 examples/finetune_trainer.py --ranks-per-sequence 2 --model NAME --text FILE --tokens 65536

The same script runs in one process, ``python examples/finetune_trainer.py``, and logs the same losses.
"""

from __future__ import annotations

import torch
from small import model_and_rows, parser
from transformers import Trainer, TrainingArguments, default_data_collator

from longspan.integrations.transformers import SequenceParallelConfig, prepare_trainer


def main() -> None:
    arguments = parser(__doc__).parse_args()
    model, rows = model_and_rows(arguments)
    args = TrainingArguments(
        output_dir="runs/finetune_trainer",
        max_steps=arguments.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=arguments.steps,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        parallelism_config=SequenceParallelConfig(cp_size=arguments.ranks_per_sequence),  # the first line
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=rows[4:], eval_dataset=rows[:4], data_collator=default_data_collator
    )
    prepare_trainer(trainer)  # the second
    trainer.train()
    trainer.end()


if __name__ == "__main__":
    main()
