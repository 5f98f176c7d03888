import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Divide a vector by its root mean square, then scale each channel (Zhang and Sennrich 2019).

    (..., dim) in, (..., dim) out. The mean square is taken in at least float32.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(
    seq_len: int, head_dim: int, theta: float = 10000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotation angle (Su et al. 2021, equation 15).

    Position t turns channel pair j by t * theta ** (-2j / head_dim) radians.
    Returns two float32 tensors (seq_len, head_dim / 2), whatever the model's precision.
    Raises ValueError if head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"rotary positions turn channels in pairs: head_dim {head_dim} is odd")
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    position = torch.arange(seq_len, dtype=torch.float32, device=device)
    angle = torch.outer(position, theta ** (-pair / head_dim))  # (T, D/2)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channels of x (B, H, T, D) by the angles of the tables (T, D/2).

    Channel j is paired with channel j + D/2, as in Llama. The arithmetic is at least float32
    and the result has the dtype of x.
    """
    x1, x2 = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention with grouped queries (Vaswani et al. 2017, equation 1).

    q (B, H, T, D), k and v (B, H_kv, S, D) give (B, H, T, D). Query head h reads key head
    h // (H / H_kv). `causal` lets the last query see every key and each earlier one a key
    less; `scale` is 1 / sqrt(D) unless given. Raises ValueError if H is no multiple of H_kv
    or if causal queries outnumber the keys.
    """
    if q.size(1) % k.size(1):
        raise ValueError(f"{q.size(1)} query heads cannot share {k.size(1)} key heads evenly")
    T, S = q.size(2), k.size(2)
    if causal and T > S:
        raise ValueError(f"causal attention needs a key for every query: {T} queries, {S} keys")
    mask = None
    if causal and 1 < T < S:  # new positions behind a cache: key s is seen when s <= t + S - T
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal and T == S, scale=scale, enable_gqa=True
    )


class KVCache:
    """Keys and values of the `length` positions seen so far, in memory allocated once.

    `keys` and `values` are (n_layer, B, n_kv_head, max_seq_len, head_dim). Layers write with
    `update`; the model moves `length` on when all of them have.
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        n_kv_head: int,
        max_seq_len: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (n_layer, batch_size, n_kv_head, max_seq_len, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, n_kv_head, T, D) behind the rest; return all S = length + T of them."""
        end = self.length + k.size(2)
        if k.size(0) != self.keys.size(1) or end > self.keys.size(3):
            room = f"{self.keys.size(1)} sequences of {self.keys.size(3)} positions"
            raise ValueError(f"the cache has room for {room}, not {k.size(0)} of {end}")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries (Ainslie et al. 2023).

    (B, T, d_model) in and out; n_head query heads share n_kv_head heads of keys and values.
    """

    def __init__(self, d_model: int, n_head: int, n_kv_head: int) -> None:
        super().__init__()
        self.head_dim = d_model // n_head
        self.q_proj = nn.Linear(d_model, n_head * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_head * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_head * self.head_dim, bias=False)
        self.o_proj = nn.Linear(n_head * self.head_dim, d_model, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, H * D) -> (B, H, T, D), a view."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        q = apply_rotary(self.heads(self.q_proj(x)), cos, sin)
        k = apply_rotary(self.heads(self.k_proj(x)), cos, sin)
        v = self.heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.update(layer, k, v)
        out = attention(q, k, v)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The gated feed-forward layer down(silu(gate(x)) * up(x)) (Shazeer 2020, equation 6)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


PRESETS: dict[str, dict[str, int]] = {
    "default": {},  # the defaults of ModelConfig: 10.36M parameters
    "pocket": dict(  # 0.92M parameters: learns on a laptop's CPU in minutes
        vocab_size=1024, n_layer=4, n_head=4, n_kv_head=2, d_model=128, d_ff=384, max_seq_len=256
    ),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer. Raises ValueError if such a model cannot be built."""

    vocab_size: int = field(default=32000, metadata={"help": "size of the vocabulary (tokens)"})
    n_layer: int = field(default=6, metadata={"help": "number of blocks"})
    n_head: int = field(default=8, metadata={"help": "query heads in a block"})
    n_kv_head: int = field(default=2, metadata={"help": "key and value heads; divides n_head"})
    d_model: int = field(default=256, metadata={"help": "width of the residual stream (channels)"})
    d_ff: int = field(default=256, metadata={"help": "width of the feed-forward (channels)"})
    max_seq_len: int = field(default=512, metadata={"help": "longest sequence (tokens)"})
    rope_theta: float = field(default=10000.0, metadata={"help": "base of the rotary wavelengths"})
    norm_eps: float = field(default=1e-5, metadata={"help": "added to the mean square in RMSNorm"})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        for whole, part in (("d_model", "n_head"), ("n_head", "n_kv_head")):
            a, b = getattr(self, whole), getattr(self, part)
            if a % b:
                raise ValueError(f"{whole} must be a multiple of {part}: {a} / {b} leaves {a % b}")
        if self.head_dim % 2:
            raise ValueError(f"d_model / n_head must be even for rotary positions: {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.d_model // self.n_head

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """A named shape: "default" (the run of this book) or "pocket" (for a laptop's CPU)."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
        return cls(**PRESETS[name])


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm, Xiong et al. 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config.d_model, config.n_head, config.n_kv_head)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.d_ff)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, cache, layer)
        return x + self.mlp(self.mlp_norm(x))


def init_weights(model: nn.Module, n_layer: int) -> None:
    """Draw every matrix from a normal of deviation 0.02, smaller where it writes to the stream.

    The two projections of a layer that add to the residual stream get 0.02 / sqrt(2 n_layer),
    so that the stream's variance does not grow with depth (Radford et al. 2019). Norms stay 1.
    """
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * n_layer) if writes else 1.0))


class Transformer(nn.Module):
    """A decoder-only language model whose head is its embedding (Press and Wolf 2017).

    Token ids (B, T) go in, logits (B, T, vocab_size) come out. `hidden` stops before the head, so
    that a sampler can skip rows and a fused loss can skip the logits.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        init_weights(self, config.n_layer)
        self.build_tables()

    def build_tables(self) -> None:
        """Put float32 rotary tables where the weights are."""
        c, device = self.config, self.embedding.weight.device
        self.tables = rotary_tables(c.max_seq_len, c.head_dim, c.rope_theta, device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Transformer":
        super()._apply(fn, recurse)  # .to(), .cuda(), .bfloat16() ... all pass through here,
        self.build_tables()  # and none may round the tables
        return self

    def check(self, ids: Tensor, end: int) -> None:
        """Raise ValueError unless ids (B, T) are in the vocabulary and end within max_seq_len."""
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"ids must have shape (batch, time), not {tuple(ids.shape)}")
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens are more than max_seq_len {self.config.max_seq_len}")
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would wait
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"token id {bad} is not in 0..{self.config.vocab_size - 1}")

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """States after the last norm, (B, T, d_model). With a cache, ids continue what it holds."""
        start = cache.length if cache is not None else 0
        end = start + ids.size(-1)
        self.check(ids, end)
        cos, sin = (table[start:end] for table in self.tables)
        x = self.embedding(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache, layer)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The tied head: states (..., d_model) to logits (..., vocab_size), at least float32."""
        out = F.linear(hidden, self.embedding.weight)
        return out if out.dtype == torch.float64 else out.float()

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, vocab_size) of the token after each of ids (B, T)."""
        return self.logits(self.hidden(ids, cache))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of targets (B, T) after ids (B, T), in nats a token."""
        logits = self.logits(self.hidden(ids))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for batch_size sequences, on the model's device and in its dtype."""
        c, w = self.config, self.embedding.weight
        return KVCache(
            c.n_layer, batch_size, c.n_kv_head, c.max_seq_len, c.head_dim, w.device, w.dtype
        )

    def num_parameters(self) -> int:
        """Number of weights; the tied head counts once."""
        return sum(weight.numel() for weight in self.parameters())


def parameter_ledger(config: ModelConfig) -> dict[str, int]:
    """Where the parameters of a Transformer are; the values add up to num_parameters()."""
    d, d_kv = config.d_model, config.n_kv_head * config.head_dim
    return {
        "embedding and head": config.vocab_size * d,
        "attention": config.n_layer * 2 * d * (d + d_kv),
        "feed-forward": config.n_layer * 3 * d * config.d_ff,
        "norms": (2 * config.n_layer + 1) * d,
    }


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations to train on one token, forward and backward.

    Each weight of a matrix costs 6: a multiplication and an addition, forward and twice backward.
    Attention adds 12 d_model a layer for each visible key, of which there are (seq_len + 1) / 2
    on average. Norms, softmax and activations are left out.
    """
    ledger = parameter_ledger(config)
    attention = 6 * config.n_layer * config.d_model * (seq_len + 1)
    return 6 * (sum(ledger.values()) - ledger["norms"]) + attention
