"""TRL's SFTTrainer with sequences shared by ranks: documents packed, adapters of PEFT.

torchrun --nproc-per-node 2 examples/finetune_sft.py
torchrun --nproc-per-node 2 examples/finetune_sft.py --model NAME --text FILE --tokens 65536
"""

from __future__ import annotations

import peft
import torch
from datasets import Dataset
from small import model_and_rows, parser
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from longspan.integrations.transformers import SequenceParallelConfig, prepare_trainer


def main() -> None:
    arguments = parser(__doc__).parse_args()
    model, rows = model_and_rows(arguments)
    if arguments.model is None:
        # TRL wants a tokenizer, here for padding alone: the rows are tokens already.
        words = Tokenizer(WordLevel({chr(byte): byte for byte in range(256)}, unk_token="?"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=chr(0), eos_token=chr(1), unk_token="?")
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    # Documents of several lengths, so that there is something to pack.
    ids = [row["input_ids"][: 64 + 97 * number % arguments.tokens].tolist() for number, row in enumerate(rows)]
    args = SFTConfig(
        output_dir="runs/finetune_sft",
        max_steps=arguments.steps,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        packing=True,
        packing_strategy="bfd",
        max_length=arguments.tokens,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        parallelism_config=SequenceParallelConfig(cp_size=arguments.ranks_per_sequence),
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=8, target_modules="all-linear"),
    )
    prepare_trainer(trainer)
    trainer.train()
    trainer.end()


if __name__ == "__main__":
    main()
