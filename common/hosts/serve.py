"""A live page for token methods on a network of yours: drop an image, move the sliders of a method, and see.

    python -m common.hosts serve vit_small_patch14_dinov2 --img-size 448 --weights FILE

opens http://127.0.0.1:7860, which this machine alone can reach: the tokens that are left, features in three colours
beside the dense network's, GMACs and time. MODEL is as for python -m common.hosts. Needs the extra [serve].
"""

from __future__ import annotations

import argparse
import importlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.run.errors import UsageError
from common.run.flags import make_parser, positive_int

if TYPE_CHECKING:
    from common.hosts.host import Facts
    from common.hosts.opening import Model

HOST = "127.0.0.1"
SIDE = 320
"""Pixels of a panel at least."""


@dataclass(frozen=True)
class Slider:
    """A setting that the page offers."""

    label: str
    low: float
    high: float
    value: float
    step: float = 1


@dataclass(frozen=True)
class Control:
    """The sliders of a method, and the settings that their values mean."""

    sliders: Sequence[Slider]
    settings: Callable[..., Mapping[str, Any]]


def controls(facts: Facts) -> dict[str, Control]:
    """What can be moved of every method on a network."""
    depth, (rows, columns) = facts.depth, facts.grid or (1, 1)
    last, third, half = depth - 1, max(depth // 3, 1), depth // 2
    most = max(facts.patches // depth, 1)

    def layer(value: int, low: int = 0) -> Slider:
        return Slider("from layer", low, last, value)

    return {
        "tome": Control([Slider("pairs merged per layer", 0, most, max(most // 2, 1))], lambda r: {"r": int(r)}),
        "hourglass": Control(
            [layer(depth // 4), Slider("rows of clusters", 1, rows, max(round(rows * 0.7), 1))],
            lambda at, side: {"layer": int(at), "clusters": (int(side), max(round(columns * side / rows), 1))},
        ),
        "evit": Control([Slider("kept at a quarter, half and three quarters", 0.1, 1, 0.7, 0.05)],
                        lambda keep: {"keep": float(keep)}),
        "evo_vit": Control([Slider("kept", 0.1, 1, 0.5, 0.05), layer(third, 1)],
                           lambda keep, at: {"keep": float(keep), "layer": int(at)}),
        "ats": Control([layer(half)], lambda at: {"layers": tuple(range(int(at), depth))}),
        "act": Control([Slider("hashes", 1, 32, 24)], lambda hashes: {"hashes": int(hashes)}),
        "smyrf": Control([Slider("hashes", 1, 16, 8), Slider("size of a cluster", 4, 64, 16, 4), layer(half)],
                         lambda hashes, size, at: {"hashes": int(hashes), "cluster_size": int(size), "layer": int(at)}),
    }  # fmt: skip


class Live:
    """What the page asks for.

    Args:
        model: of ``open_model``, on its device.
        rounds: timed passes, of which the fastest counts.
    """

    def __init__(self, model: Model, *, rounds: int = 3) -> None:
        from common.hosts.network import explain, lean

        self.model, self.rounds = model, rounds
        self.dense = lean(model.net)
        answers = explain(model.net)
        known = controls(self.dense.plan.host.facts)
        self.controls = {name: known[name] for name, answer in answers.items() if answer.startswith("possible")}
        self.refused = {name: answer for name, answer in answers.items() if name not in self.controls}
        self.device = next(model.net.parameters()).device

    def show(self, image: Any, method: str, *values: float) -> tuple[Any, Any, Any, str]:
        """What a method makes of an image.

        Args:
            image: of Pillow, RGB.
            method: by name.
            values: of its sliders, in their order.

        Returns:
            Pillow images of the tokens (None where a patch is part of none), of the features and of the dense
            network's, and a text.
        """
        import torch
        import torch.nn.functional as F

        from common.hosts.draw import Principal, mosaic, spread, to_image
        from common.hosts.network import lean, make_method
        from common.hosts.trade import tokens_of_patches

        images = self.model.preprocessing.transform()(image)[None].to(self.device, self.model.dtype)
        chosen = make_method(method, self.controls[method].settings(*values))
        fast = lean(self.model.net, chosen, verify=False)
        with torch.no_grad():
            dense, found = (self._features(network, images) for network in (self.dense, fast))
            speeds = [self._milliseconds(network, images) for network in (self.dense, fast)]
            depth = fast.plan.host.facts.depth
            left = next(iter(tokens_of_patches(fast, images, [depth])), None)
            counts = fast.tokens_per_layer(images)
        pixels = self.model.preprocessing.pixels(images.cpu())[0]
        colours = Principal(dense)
        size = (pixels.shape[1], pixels.shape[2])
        features, of_dense = (to_image(spread(colours.colours(each), *size)) for each in (found, dense))
        cosine = float(F.cosine_similarity(found, dense, dim=0).mean())
        costs = [network.gmacs(images) for network in (self.dense, fast)]
        text = (
            f"**{chosen.name}** {fast.methods[0]}\n\n{counts[0]} tokens enter, {counts[-1]} leave\n\n"
            f"{costs[1]:.3f} GMACs of {costs[0]:.3f}, {speeds[1]:.1f} ms of {speeds[0]:.1f} "
            f"({speeds[0] / speeds[1]:.2f} x), cosine of the features {cosine:.4f}"
        )
        if not self.model.trained:
            text += f"\n\nWeights: {self.model.weights}"
        return None if left is None else to_image(mosaic(pixels, left[2])), features, of_dense, text

    @staticmethod
    def _features(network: Any, images: Any) -> Any:
        return network.features(images)[0].float().cpu()

    def _milliseconds(self, network: Any, images: Any) -> float:
        """Of the fastest pass; copying a number back waits for a device."""
        seconds = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            float(network.normalized(images, restored=False).sum())
            seconds.append(time.perf_counter() - start)
        return 1000 * min(seconds)


def _enlarged(image: Any) -> Any:
    """At least ``SIDE`` pixels high, each pixel as a square of them: the page enlarges none."""
    if image is None:
        return None
    times = -(-SIDE // image.height)
    return image.resize((times * image.width, times * image.height), resample=0)


def build_page(live: Live) -> Any:
    """The page: a group of sliders for each method, of which the chosen one's are seen."""
    import gradio as gr  # pyright: ignore[reportMissingImports] - an extra

    with gr.Blocks(title=f"LeanViT: {live.model.spec}", analytics_enabled=False) as page:
        gr.Markdown(f"# {live.model.spec}\nWeights: {live.model.weights}")
        first = next(iter(live.controls))
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="pil", image_mode="RGB", label="image")
                method = gr.Dropdown(list(live.controls), value=first, label="method")
                groups, sliders = {}, {}
                for name, control in live.controls.items():
                    with gr.Group(visible=name == first) as groups[name]:
                        sliders[name] = [
                            gr.Slider(each.low, each.high, each.value, step=each.step, label=f"{name}: {each.label}")
                            for each in control.sliders
                        ]
            with gr.Column():
                text = gr.Markdown("Drop an image.")
                tokens, features, dense = (
                    gr.Image(label=label, buttons=["download", "fullscreen"], render=False)  # none that sends it away
                    for label in ("tokens that are left", "features", "dense features")
                )
                tokens.render()
                with gr.Row():
                    features.render()
                    dense.render()
        if live.refused:
            gr.Markdown("\n".join(f"- {name} is {reason}" for name, reason in live.refused.items()))
        flat = [slider for each in sliders.values() for slider in each]
        places = {name: [flat.index(slider) for slider in each] for name, each in sliders.items()}

        def choose(name: str) -> list[Any]:
            return [gr.Group(visible=each == name) for each in groups]

        def show(image: Any, name: str, *values: float) -> tuple[Any, Any, Any, str]:
            if image is None:
                return None, None, None, "Drop an image."
            try:
                *images, text = live.show(image, name, *(values[place] for place in places[name]))
                return (*map(_enlarged, images), text)  # pyright: ignore[reportReturnType]
            except UsageError as error:
                return None, None, None, f"**{name}**: {error}"

        method.change(choose, method, list(groups.values()), api_name="choose")
        outputs = [tokens, features, dense, text]
        gr.on(
            [image.change, method.change, *(slider.release for slider in flat)],
            show, [image, method, *flat], outputs, api_name="show",
        )  # fmt: skip
    return page


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog="python -m common.hosts serve")
    parser.add_argument("name", metavar="MODEL", help="the network, as for python -m common.hosts")
    parser.add_argument("--img-size", type=positive_int, help="pixels of a side (default: the network's own)")
    parser.add_argument("--weights", type=Path, help="checkpoint (safetensors, pth), which must fit")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--port", type=positive_int, default=7860, help="of the page (default: 7860)")
    return parser.parse_args(argv)


def _check_port(port: int) -> None:
    """Before a network is opened for nothing."""
    try:
        with socket.socket() as asked:
            asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left just now is free
            asked.bind((HOST, port))
    except (OSError, OverflowError) as error:
        raise UsageError(f"--port {port} cannot be opened ({error}): expected a free one of 1024 to 65535") from error


def serve(argv: Sequence[str] | None = None, *, block: bool = True) -> Any:
    """Open the page; with ``block`` until interrupted. Returns the page, whose ``local_url`` says where it is.

    Raises:
        UsageError: if gradio is missing, the port is not free, or the network is not known.
    """
    args = parse_args(argv)
    try:
        importlib.import_module("gradio")  # an extra
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the live page needs {error.name}: pip install 'leanvit[serve]'; python -m common.hosts MODEL "
            "--images DIR --output DIR writes a page without it"
        ) from error
    _check_port(args.port)
    from common.hosts.opening import open_model
    from common.run.launch import choose_device

    device = choose_device(args.device)
    model = open_model(args.name, image_size=args.img_size, weights=args.weights)
    model.net.to(device)
    page = build_page(Live(model))
    page.launch(server_name=HOST, server_port=args.port, prevent_thread_lock=not block, share=False)
    return page
