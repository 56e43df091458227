"""The SWAG Vision Transformer: B/16, L/16 and H/14, the backbone that every method of this paper shares.

Paper: Revisiting Weakly Supervised Pre-Training of Visual Perception Models (SWAG), arXiv:2201.08371. Parameter names
and shapes are those of the published checkpoints.

Letters: B images, N tokens (P patches and, with classifier "token", the class token), C width, h heads, d = C / h,
M width of the MLP, L layers, p patch size.

Tokens travel sequence first, (N, B, C), between modules, as in the published code. Their storage is batch first: an
``EncoderBlock`` transposes views, which costs nothing, and all matrix products run on contiguous (B, N, C) tensors.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hourglass_swag.models.weights import POSITION_KEY, convert_torchvision, resize_position_embedding

LAYER_NORM_EPS = 1e-6

Classifier = Literal["token", "gap"]


class ConvStemLayer(NamedTuple):
    """One 3 x 3-style stage of a convolutional stem: convolution, batch normalisation, ReLU."""

    kernel: int
    stride: int
    out_channels: int


@dataclass(frozen=True)
class Size:
    """Shape of one network, as keyword arguments of ``VisionTransformer``."""

    patch_size: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    mlp_dim: int
    conv_stem_layers: tuple[ConvStemLayer, ...] | None = None

    def kwargs(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


SIZES: dict[str, Size] = {
    "b16": Size(patch_size=16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072),
    "l16": Size(patch_size=16, num_layers=24, num_heads=16, hidden_dim=1024, mlp_dim=4096),
    "h14": Size(patch_size=14, num_layers=32, num_heads=16, hidden_dim=1280, mlp_dim=5120),
    # Not published: the network of the embedded experiment on 32 x 32 images of digits. A convolutional stem, because
    # 1,437 images are too few to learn patches from in two minutes.
    "desk": Size(
        patch_size=4,
        num_layers=8,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
        conv_stem_layers=(ConvStemLayer(3, 2, 32), ConvStemLayer(3, 2, 64)),
    ),
}


class SelfAttention(nn.Module):
    """Multi-head self-attention with the packed parameters of ``torch.nn.MultiheadAttention``, fused.

    Args:
        embed_dim: width C.
        num_heads: number of heads; it must divide the width.
        dropout: rate at the attention weights in training.

    Raises:
        ValueError: if the width is not a multiple of the number of heads.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"hidden_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``x`` (B, N, C), each a view of shape (B, h, N, d)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, N, 3C)
        qkv = qkv.unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)  # (3, B, h, N, d)
        q, k, v = qkv.unbind(0)
        return q, k, v

    def merge_heads(self, out: Tensor) -> Tensor:
        """Concatenate the heads of ``out`` (B, h, N, d) and project: (B, N, C)."""
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """Attention among the tokens of ``x`` (B, N, C); same shape."""
        q, k, v = self.project(x)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.merge_heads(out)


class MLPBlock(nn.Sequential):
    """Two linear layers with an exact GELU between them, dropout after either."""

    def __init__(self, hidden_dim: int, mlp_dim: int, dropout_rate: float) -> None:
        linear_1, linear_2 = nn.Linear(hidden_dim, mlp_dim), nn.Linear(mlp_dim, hidden_dim)
        for linear in (linear_1, linear_2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
        super().__init__(
            OrderedDict(
                linear_1=linear_1,
                act=nn.GELU(),
                dropout_1=nn.Dropout(dropout_rate),
                linear_2=linear_2,
                dropout_2=nn.Dropout(dropout_rate),
            )
        )
        self.hidden_dim, self.mlp_dim = hidden_dim, mlp_dim


class EncoderBlock(nn.Module):
    """Pre-norm transformer layer: ``x + drop(attention(ln_1(x)))``, then ``x + mlp(ln_2(x))``."""

    def __init__(
        self, num_heads: int, hidden_dim: int, mlp_dim: int, dropout_rate: float, attention_dropout_rate: float
    ) -> None:
        super().__init__()
        self.num_heads, self.hidden_dim, self.mlp_dim = num_heads, hidden_dim, mlp_dim
        self.ln_1 = nn.LayerNorm(hidden_dim, eps=LAYER_NORM_EPS)
        self.self_attention = SelfAttention(hidden_dim, num_heads, attention_dropout_rate)
        self.dropout = nn.Dropout(dropout_rate)
        self.ln_2 = nn.LayerNorm(hidden_dim, eps=LAYER_NORM_EPS)
        self.mlp = MLPBlock(hidden_dim, mlp_dim, dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """One layer; ``x`` and the result are (N, B, C)."""
        x = x.transpose(0, 1)  # (B, N, C), contiguous inside the network: see the top of this file
        x = x + self.dropout(self.self_attention(self.ln_1(x)))
        x = x + self.mlp(self.ln_2(x))
        return x.transpose(0, 1)

    def flops(self, x: Tensor) -> int:
        """The published code's closed form for an input (N, B, C); not the convention of its FLOPs tool."""
        N, B, C = x.shape
        h, M = self.num_heads, self.mlp_dim
        attention = 3 * N * (C + 1) * C + C * N + C * N**2 + h * N**2 + C * N**2 + N * (C + 1) * C
        mlp = N * (C + 1) * M + N * M + N * (M + 1) * C
        return B * (6 * N * C + attention + mlp)

    def activations(self, out: Tensor, x: Tensor) -> int:
        """The published code's closed form of activations per image for an input (N, B, C)."""
        N, _, C = x.shape
        h, M = self.num_heads, self.mlp_dim
        return 3 * N * C + h * N**2 + C * N + C * N + N * M + N * C


class Encoder(nn.Module):
    """Position embedding, dropout, the layers ``layer_0 ...``, final LayerNorm.

    Args:
        seq_length: number of tokens N.
        num_layers, hidden_dim: L and C.
        dropout_rate: rate after the position embedding and in the layers.
        num_heads, mlp_dim, attention_dropout_rate: see ``EncoderBlock``.
    """

    def __init__(
        self,
        seq_length: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout_rate: float,
        attention_dropout_rate: float,
    ) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(seq_length, 1, hidden_dim).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout_rate)
        shape = (num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate)
        self.layers = nn.Sequential(OrderedDict((f"layer_{i}", EncoderBlock(*shape)) for i in range(num_layers)))
        self.ln = nn.LayerNorm(hidden_dim, eps=LAYER_NORM_EPS)

    def embed(self, x: Tensor) -> Tensor:
        """Add the position embedding to ``x`` (N, B, C)."""
        return x + self.pos_embedding

    def forward(self, x: Tensor) -> Tensor:
        """All layers; ``x`` and the result are (N, B, C)."""
        x = self.layers(self.dropout(self.embed(x)))
        return self.ln(x.transpose(0, 1)).transpose(0, 1)


class VisionTransformerHead(nn.Module):
    """Classification head on features (B, in_plane).

    Args:
        in_plane: width of the features.
        num_classes: width of the output; None for no layer at all.
        hidden_dim: width of a hidden layer with tanh; None for none.
        normalize_inputs: "l2" divides the features by their norm first.

    Raises:
        ValueError: for another ``normalize_inputs``.
    """

    def __init__(
        self,
        in_plane: int,
        num_classes: int | None = None,
        hidden_dim: int | None = None,
        normalize_inputs: Literal["l2"] | None = None,
    ) -> None:
        super().__init__()
        if normalize_inputs not in (None, "l2"):
            raise ValueError(f"normalize_inputs must be 'l2' or None, got {normalize_inputs!r}")
        self.normalize_inputs = normalize_inputs
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if num_classes is not None:
            if hidden_dim is not None:
                pre_logits = nn.Linear(in_plane, hidden_dim)
                nn.init.trunc_normal_(pre_logits.weight, std=math.sqrt(1 / in_plane))
                nn.init.zeros_(pre_logits.bias)
                layers["pre_logits"], layers["tanh"] = pre_logits, nn.Tanh()
            head = nn.Linear(in_plane if hidden_dim is None else hidden_dim, num_classes)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            layers["head"] = head
        self.layers = nn.Sequential(layers)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, num_classes) of features (B, in_plane)."""
        if self.normalize_inputs == "l2":
            features = F.normalize(features, dim=1)
        return self.layers(features)


class VisionTransformer(nn.Module):
    """Vision Transformer for square images. Token methods run it through ``common.hosts``, see ``hourglass_swag.host``.

    Args:
        image_size: side of the input in pixels, a multiple of ``patch_size``.
        patch_size, num_layers, num_heads, hidden_dim, mlp_dim: p, L, h, C, M.
        dropout_rate: after the position embedding and in every layer.
        attention_dropout_rate: at the attention weights.
        classifier: "token" (read a class token) or "gap" (average the patches; no class token).
        conv_stem_layers: stages (``ConvStemLayer``, or what makes one) of a convolutional stem in place of one p x p
            convolution; their strides multiply to p.
        num_classes: width of the head; None returns the features (B, C).

    Raises:
        ValueError: if sizes do not fit, or for an unknown classifier.
        TypeError: if ``num_classes`` is not an integer.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        classifier: Classifier = "token",
        conv_stem_layers: Sequence[Sequence[int] | Mapping[str, int]] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if image_size < 1 or image_size % patch_size:
            below = max(image_size // patch_size, 0)
            nearest = ", ".join(str(side * patch_size) for side in (below, below + 1) if side)
            raise ValueError(
                f"image_size must be a multiple of patch_size = {patch_size}, got {image_size}; nearest are {nearest}"
            )
        if classifier not in ("token", "gap"):
            raise ValueError(f"classifier must be 'token' or 'gap', got {classifier!r}")
        if num_classes is not None and not isinstance(num_classes, int):
            raise TypeError(f"num_classes must be an integer or None, got {num_classes!r}")
        self.image_size, self.patch_size = image_size, patch_size
        self.hidden_dim, self.mlp_dim = hidden_dim, mlp_dim
        self.num_heads, self.num_layers = num_heads, num_layers
        self.dropout_rate, self.attention_dropout_rate = dropout_rate, attention_dropout_rate
        self.classifier: Classifier = classifier
        self.num_classes = num_classes
        self.grid_size = image_size // patch_size  # side of the square of patches
        self.conv_proj = _patch_projection(patch_size, hidden_dim, conv_stem_layers)
        if classifier == "token":
            self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.encoder = Encoder(
            self.seq_length, num_layers, num_heads, hidden_dim, mlp_dim, dropout_rate, attention_dropout_rate
        )
        self.trunk_output = nn.Identity()
        self.head = None if num_classes is None else VisionTransformerHead(hidden_dim, num_classes)

    @property
    def num_patches(self) -> int:
        """Patches of one image, P."""
        return self.grid_size**2

    @property
    def num_class_tokens(self) -> int:
        """1 with classifier "token", 0 with "gap"."""
        return int(self.classifier == "token")

    @property
    def seq_length(self) -> int:
        """Tokens that enter the encoder, N."""
        return self.num_patches + self.num_class_tokens

    def embed(self, images: Tensor) -> Tensor:
        """Patches of images (B, 3, S, S), row by row, behind the class token if there is one: (N, B, C)."""
        if images.dim() != 4 or images.shape[2] != self.image_size or images.shape[3] != self.image_size:
            raise ValueError(
                f"expected images (batch, 3, {self.image_size}, {self.image_size}), got {tuple(images.shape)}: "
                "resize them, or build the model with the image_size (-r) that you want to feed"
            )
        x = _embed_patches(self.conv_proj, images)  # (B, P, C)
        if self.classifier == "gap":
            return x.contiguous().transpose(0, 1)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1).transpose(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, S, S), or features (B, C) without a head.

        Raises:
            ValueError: if the images do not have the side ``image_size``.
        """
        x = self.encoder(self.embed(images))
        x = self.trunk_output(x[0] if self.classifier == "token" else x.mean(dim=0))
        return x if self.head is None else self.head(x)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint of the published or of torchvision's layout, trained at any resolution.

        The position embedding is resized if needed (bicubic, corners aligned). ``state_dict`` itself is not changed.

        Returns:
            torch's report of missing and unexpected keys.

        Raises:
            KeyError: if there is no position embedding.
            ValueError: if the position embedding has another width, or no square number of patches.
            RuntimeError: naming all keys that are missing, unexpected or of another shape (with ``strict``).
        """
        return super().load_state_dict(self.adapt_state(state_dict), strict=strict, assign=assign)

    def adapt_state(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a checkpoint under this model's names and for its resolution; see ``load_state_dict``."""
        state = convert_torchvision(state_dict)
        state[POSITION_KEY] = resize_position_embedding(
            state, self.seq_length, self.hidden_dim, class_tokens=self.num_class_tokens
        )
        return state


def _embed_patches(projection: nn.Module, images: Tensor) -> Tensor:
    """Tokens (B, P, C) of images (B, 3, S, S).

    On a GPU the patches are cut out and multiplied: cuDNN's convolution of three channels takes 5 % of a pass there.
    """
    if not (images.is_cuda and isinstance(projection, nn.Conv2d) and projection.kernel_size == projection.stride):
        return projection(images).flatten(2).transpose(1, 2)
    height, width = projection.kernel_size
    patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, 3, rows, p, columns, p)
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return F.linear(patches, projection.weight.flatten(1), projection.bias)


def _patch_projection(
    patch_size: int, hidden_dim: int, stem: Sequence[Sequence[int] | Mapping[str, int]] | None
) -> nn.Conv2d | nn.Sequential:
    """Images to patch embeddings: one convolution of a patch, or a stem that ends in a 1 x 1 convolution."""
    if stem is None:
        projection = nn.Conv2d(3, hidden_dim, kernel_size=patch_size, stride=patch_size)
        nn.init.trunc_normal_(projection.weight, std=math.sqrt(1 / (3 * patch_size**2)))
        nn.init.zeros_(projection.bias)  # pyright: ignore[reportArgumentType]
        return projection
    layers = [ConvStemLayer(**layer) if isinstance(layer, Mapping) else ConvStemLayer(*layer) for layer in stem]
    if math.prod(layer.stride for layer in layers) != patch_size:
        raise ValueError(
            f"the strides of conv_stem_layers must multiply to patch_size = {patch_size}, "
            f"got {[layer.stride for layer in layers]}"
        )
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for i, (kernel, stride, out_channels) in enumerate(layers):
        if kernel % 2 == 0:
            raise ValueError(f"kernels of conv_stem_layers must be odd, got {kernel} in layer {i}")
        modules[f"conv_{i}"] = nn.Conv2d(channels, out_channels, kernel, stride, (kernel - 1) // 2, bias=False)
        modules[f"bn_{i}"] = nn.BatchNorm2d(out_channels)
        modules[f"relu_{i}"] = nn.ReLU()
        channels = out_channels
    modules[f"conv_{len(layers)}"] = nn.Conv2d(channels, hidden_dim, kernel_size=1)
    return nn.Sequential(modules)


def make_vit(size: str, **options: Any) -> VisionTransformer:
    """The network of a size of ``SIZES``; ``options`` are further arguments of ``VisionTransformer``."""
    arguments: dict[str, Any] = {"image_size": 224, **SIZES[size].kwargs(), **options}
    return VisionTransformer(**arguments)
