"""What a timm Vision Transformer merges in an image: side by side the image and its groups of patches.

python 2_visualize_timm.py image.jpg --model vit_large_patch16_384 -r 23 --output merged.png
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false
# (timm exports by convention, and modules answer for any attribute)

import argparse

import timm
import timm.data
import tome
import torch
from PIL import Image
from torchvision import transforms


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="file of the image")
    parser.add_argument("--model", default="vit_base_patch16_224", help="name of a timm VisionTransformer")
    parser.add_argument("-r", type=int, default=16, help="tokens merged in every layer")
    parser.add_argument("--output", default="merged.png", help="file to write")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights, to try the script out")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    model = timm.create_model(args.model, pretrained=not args.no_pretrained).eval()
    config = timm.data.resolve_model_data_config(model)
    side = config["input_size"][1]
    cut = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side)])
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"])])
    image = cut(Image.open(args.image).convert("RGB"))
    tome.patch.timm(model, trace_source=True)
    model.r = args.r
    with torch.inference_mode():
        model(normalize(image)[None])
    merged = tome.make_visualization(
        image,
        model._tome_info["source"],
        patch_size=model.patch_embed.patch_size[0],
        prefix_tokens=model.num_prefix_tokens,
    )
    both = Image.new("RGB", (2 * side, side))
    both.paste(image, (0, 0))
    both.paste(merged, (side, 0))
    both.save(args.output)
    print(f"{model._tome_info['source'].shape[1]} tokens left; written to {args.output}")


if __name__ == "__main__":
    main(parse_args())
