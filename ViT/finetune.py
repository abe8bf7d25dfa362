"""Fine-tune a timm Vision Transformer on images with control, LoRA or another adapter, or a linear probe; write a run record.

    python -m ViT.finetune --method control                                    ViT-B/16 on CIFAR-100 from the hubs
    python -m ViT.finetune --method control --data digits --model tiny --device cpu --epochs 20 --batch_size 32 --lr 0.05   no hub
    python -m ViT.finetune --evaluate results/vit/RUN/adapter --data flowers102         test accuracy of an adapter
    python -m ViT.finetune --predict PHOTOS --adapter results/vit/RUN/adapter --output classes.csv

The defaults are the paper's recipe, except that --mlp_layers 4 and --attention eager give its exact model. What
the options trade: --attention sdpa needs 3 GB less than eager and gives the same results; --memory fast, balanced
and lean lower the control's peak on models that support them; --keep host leaves the images in main memory. See ViT/README.md.

options.py says what can be asked for, recipe.py how a model is trained, inference.py what a trained one answers.
"""

from __future__ import annotations

from control_experiments.errors import run_main
from control_experiments.training.arguments import parse_arguments
from ViT.options import Options


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    options.check()
    from ViT import inference, recipe  # with torch and timm, for which --help and a wrong option do not wait

    if options.evaluate:
        inference.evaluate(options)
    elif options.predict:
        inference.classify_folder(options)
    else:
        recipe.train(options)


if __name__ == "__main__":
    run_main(main)
