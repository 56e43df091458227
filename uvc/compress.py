"""Turn a checkpoint with masks and gates into a plain smaller network with the same outputs.

    python uvc/compress.py --checkpoint STAGE2.pth.tar --output small_50
    python uvc/compress.py --checkpoint STAGE2.pth.tar --output small_50 --round-to 8 --benchmark --batch-size 16
    python uvc/compress.py --checkpoint STAGE2.pth.tar --output small_50 --onnx small_50.onnx --export small_50.pt2

Writes small_50.safetensors and small_50.json (sizes, kept indices, costs). Every file written is compared with the
masked network on random images. --benchmark times the dense network of the same code in turns with the compact one: as
the file loads (padded by zeros where that is faster), in its exact sizes and, with --round-to N, as the file holds it.
The last line is the remaining cost by the paper's rules in percent, as in the paper's table.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.run import cli
from common.run.errors import CheckpointError
from common.run.files import check_files, check_output
from common.run.program import run

AGREEMENT = 1e-4
"""Largest difference of float32 logits, relative to the largest, that still counts as rounding."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="file or URL of stage 1 or 2, ours or a published one")
    add("--output", required=True, metavar="F", help="writes F.safetensors and F.json")
    add("--model_type", default="", metavar="NAME", help="architecture (default: as the file or its name says)")
    add(
        "--round-to", type=cli.positive_int, default=1, metavar="N",
        help="pad kept value dimensions of a layer and kept neurons by zeros to multiples of N, which GPUs' matrix "
        "kernels like better; 8 is usual (default: 1, no padding)",
    )  # fmt: skip
    add(
        "--drop-patches", action="store_true",
        help="take tokens of patches whose gate is below one half out of the sequence although the checkpoint was not "
        "trained so; outputs change, fine-tune afterwards",
    )  # fmt: skip
    add("--timm", action="store_true", help="also check that timm's VisionTransformer gives the same logits")
    add("--export", metavar="FILE.pt2", help="also write a torch.export program")
    add("--onnx", metavar="FILE.onnx", help="also write ONNX, checked by onnxruntime")
    add("--benchmark", action="store_true", help="time the dense and the compact network in turns")
    add("--batch-size", type=cli.positive_int, default=4, metavar="B", help="images per timed pass (default: 4)")
    add("--rounds", type=cli.positive_int, default=20, help="timed rounds (default: 20)")
    add(
        "--processor-time", action="store_true",
        help="on a CPU with other work to do: time what one thread computes instead of the time that passes",
    )  # fmt: skip
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="precision of --benchmark")
    add("--device", default="auto", help="of --benchmark: auto (CUDA if there is one), cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    if not args.output:
        parser.error("--output is empty: give the name of a file")
    if args.export and not args.export.endswith(".pt2"):
        parser.error(f"--export {args.export}: the name must end in .pt2, which torch.export.load asks for")
    if args.processor_time and args.device not in ("cpu", "auto"):
        parser.error("--processor-time: a GPU's work does not count as processor time; it goes with --device cpu")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compress, write, check; returns costs, agreement and speeds."""
    args = parse_args(argv)
    check_files(args.checkpoint)
    weights = Path(args.output if args.output.endswith(".safetensors") else f"{args.output}.safetensors")
    check_output(args.output)
    check_output(weights, weights.with_suffix(".json"), args.export, args.onnx, inputs=[args.checkpoint])
    from common.run.export import export_onnx, export_program
    from common.run.launch import choose_device
    from uvc import compact_files
    from uvc.compact_files import difference, load_compact, save_compact
    from uvc.loading import load_masked
    from uvc.removal import compress, costs_of, dense_network, measure_speeds, versions_of

    masked = load_masked(args.checkpoint, args.model_type)
    model = masked.model
    compressed = compress(model, multiple=args.round_to, drop_patches=args.drop_patches, name=masked.model_type)
    if not compressed.structure.running:
        print("warning: every block is skipped; nothing but the embedding and the head is left", file=sys.stderr)
    facts: dict[str, Any] = costs_of(model, compressed)
    shape = compressed.image_shape
    images = compact_files.example_images(shape).to(next(model.parameters()).dtype)
    facts["difference"] = difference(compressed.network, model, images)
    exact = not args.drop_patches or model.gates.patch == "remove"
    if exact and facts["difference"] > AGREEMENT:
        raise CheckpointError(f"{args.checkpoint}: logits differ by {facts['difference']:.2e}; please report the file")
    weights, description = save_compact(compressed, args.output, source=Path(args.checkpoint).name, costs=facts)
    facts["read_back_difference"] = difference(load_compact(weights).network, model, images)
    print(f"{weights}: {len(compressed.structure.running)} of {len(compressed.structure.blocks)} blocks, "
          f"{facts['params_m']:.3f} M of {facts['dense_params_m']:.3f} M parameters; {description.name} says what is "
          f"kept")  # fmt: skip
    print(f"logits differ from the masked network's by {facts['read_back_difference']:.1e} of the largest"
          + ("" if exact else "; tokens were dropped, so fine-tune"))  # fmt: skip
    if args.timm:
        facts["timm_difference"] = difference(compact_files.to_timm(compressed.network), model, images)
        print(f"timm's VisionTransformer gives them to {facts['timm_difference']:.1e}")
    for flag, export in (("export", export_program), ("onnx", export_onnx)):
        if path := getattr(args, flag):
            network = compressed.network.float().cpu().eval()
            images = compact_files.example_images(shape, 3)
            print(f"{path}: differs by {export(network, images, path):.1e}")
    if args.benchmark:
        facts["speeds"] = measure_speeds(
            dense_network(model, compressed), versions_of(compressed, args.round_to), shape,
            device=choose_device(args.device), dtype=args.dtype, batch=args.batch_size,
            rounds=args.rounds, processor_time=args.processor_time,
        )  # fmt: skip
        for row in facts["speeds"]:
            print(f"{row['network']}: {row['latency_ms']:.2f} ms, {row['throughput_ips']:.1f} images/s, "
                  f"{row['speedup']:.2f} x of {row['flops_ratio']:.2f} x ({100 * row['realised']:.0f} % realised); "
                  f"{row['device']}, {row['dtype']}, batch {row['batch_size']}")  # fmt: skip
        save_compact(compressed, args.output, source=Path(args.checkpoint).name, costs=facts)
    print(f"GMACs by the paper's rules {facts['counted_gmacs']:.4f} of {facts['dense_gmacs']:.4f}; really "
          f"{facts['real_gmacs']:.4f} ({facts['real_remaining_percent']:.2f} %)")  # fmt: skip
    print(f"remaining {facts['remaining_percent']:.2f} %")
    return facts


if __name__ == "__main__":
    run(main, expected=(OSError,))
