"""How far attention may reach: farther, a crystal's images or wave vectors fill the memory."""

from __future__ import annotations

from cluster.errors import UserError
from crystalformer.config import ModelConfig

MAX_RADIUS = 100.0
"""Å. Neighbour lists grow with its cube: some 9 MB a crystal here, where the paper's 11.9 Å take 18 KB."""

MAX_WAVE_RADIUS = 20.0
"""1/Å. The wave vectors grow with its cube: 68 per Å³ of a cell here, where the paper's 3.9 1/Å hold 0.5."""


def check_reach(config: ModelConfig) -> None:
    """UserError where a model's attention reaches farther than is computed, in either space."""
    if config.neighbor_radius > MAX_RADIUS:
        raise UserError(
            "cutoff_sigmas * scale_real / sqrt(gauss_lb_real), the reach of attention, "
            f"must be at most {MAX_RADIUS:g} Å, got {config.neighbor_radius:.4g} Å"
        )
    if config.wave_radius > MAX_WAVE_RADIUS:
        raise UserError(
            "cutoff_sigmas / (scale_reci * sqrt(gauss_lb_reci)), the reach in reciprocal space, "
            f"must be at most {MAX_WAVE_RADIUS:g} 1/Å, got {config.wave_radius:.4g} 1/Å"
        )
