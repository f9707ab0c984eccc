"""Whisper-tiny's encoder: log-mel spectrogram of 30 s -> all hidden states, 50 steps a second.

Keys are those of the published transformers file without their `model.encoder.` prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musetalk.nets.layers import attend


@dataclass(frozen=True)
class WhisperConfig:
    """Keys of `whisper/config.json` that shape the encoder."""

    num_mel_bins: int = 80
    d_model: int = 384
    encoder_layers: int = 4
    encoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    max_source_positions: int = 1500  # 30 s at 50 Hz


class SelfAttention(nn.Module):
    """Multi-head self-attention; keys have no bias (Whisper)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> (N, T, width)."""
        return cast(Tensor, self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads)))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, cfg: WhisperConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(cfg.d_model, cfg.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(cfg.d_model)
        self.fc1 = nn.Linear(cfg.d_model, cfg.encoder_ffn_dim)
        self.fc2 = nn.Linear(cfg.encoder_ffn_dim, cfg.d_model)
        self.final_layer_norm = nn.LayerNorm(cfg.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> (N, T, width)."""
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return cast(Tensor, x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))))


class WhisperEncoder(nn.Module):
    """See the module docstring."""

    def __init__(self, cfg: WhisperConfig | None = None) -> None:
        super().__init__()
        self.cfg = cfg = cfg or WhisperConfig()
        self.conv1 = nn.Conv1d(cfg.num_mel_bins, cfg.d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(cfg.d_model, cfg.d_model, 3, stride=2, padding=1)
        # not drawn at random: on the meta device that alone imports torch's compiler, most of a second
        table = torch.zeros(cfg.max_source_positions, cfg.d_model)
        self.embed_positions = nn.Embedding.from_pretrained(table, freeze=False)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.encoder_layers))
        self.layer_norm = nn.LayerNorm(cfg.d_model)

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel (N, 80, 3000) -> hidden states (N, 1500, 5, 384).

        Layer axis: the input of each layer, then the final layer norm of the last layer's output.
        """
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.embed_positions.weight[: x.shape[1]]
        states = []
        for layer in self.layers:
            states.append(x)
            x = layer(x)
        states.append(self.layer_norm(x))
        return torch.stack(states, dim=2)
