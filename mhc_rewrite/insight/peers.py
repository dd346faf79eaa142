"""Sites of other packages in a model that was converted here, for comparison: one package, one class, one line.

Such a site has parameters of its own where the package makes them, so the numbers differ; what is run does not.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from mhc_rewrite.errors import PeerError
from mhc_rewrite.sites.hyper_connection import HyperConnection


class PeerSite(nn.Module):
    """A site's calls in terms of `pre` and `post`, which a subclass has; no peer fuses more than these.

    Attributes:
        module, package: what is imported, and what to install for it.
        devices: those that it runs on.
    """

    module: str
    package: str
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __init__(self, site: HyperConnection) -> None:
        super().__init__()
        self.n = site.config.n
        if site.channel_dim != -1:
            raise PeerError("The other packages take channels last; this model has streams with channels elsewhere.")

    @classmethod
    def missing(cls, device: str) -> str:
        """Why it can't run on a device here; empty where it can."""
        if device not in cls.devices:
            return f"it runs on {' and '.join(cls.devices)} only"
        try:
            importlib.import_module(cls.module)
        except ImportError as error:
            return f"{error}; install it with: pip install {cls.package}"
        return ""

    def pre(self, streams: Tensor) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def post(self, streams: Tensor, branch: Tensor, mix: Any) -> Tensor:
        raise NotImplementedError

    def boundary(self, streams: Tensor, branch: Tensor, mix: Any) -> tuple[Tensor, Tensor, Any]:
        state = self.post(streams, branch, mix)
        return state, *self.pre(state)

    def post_collapse(self, streams: Tensor, branch: Tensor, mix: Any) -> Tensor:
        return self.post(streams, branch, mix).mean(-2)

    def _all(self, streams: Tensor) -> Tensor:
        """n streams, also where one stands for n that are equal."""
        return streams.expand(*streams.shape[:-2], self.n, streams.shape[-1])


class HyperConnections(PeerSite):
    """hyper-connections: plain PyTorch, coefficients from each stream by itself."""

    module = "hyper_connections.mHCv2"
    package = "hyper-connections"

    def __init__(self, site: HyperConnection) -> None:
        super().__init__(site)
        module, iterations = importlib.import_module(self.module), site.config.sinkhorn_iterations
        self.inner = module.ManifoldConstrainedHyperConnections(
            self.n, dim=site.width, layer_index=site.index, sinkhorn_iters=iterations
        ).to(site.phi.device)

    def pre(self, streams: Tensor) -> tuple[Tensor, Any]:
        u, mixed, beta = self.inner.width_connection(self._all(streams))
        return u, (mixed, beta)

    def post(self, streams: Tensor, branch: Tensor, mix: Any) -> Tensor:
        mixed, beta = mix
        return self.inner.depth_connection(branch, mixed, **beta)


class Liger(PeerSite):
    """liger-kernel: Triton kernels for the coefficients, the sum over streams and the next state."""

    module = "liger_kernel.transformers.functional"
    package = "liger-kernel"
    devices = ("cuda",)

    def __init__(self, site: HyperConnection) -> None:
        super().__init__(site)
        self.functional = importlib.import_module(self.module)
        self.site = site

    def pre(self, streams: Tensor) -> tuple[Tensor, Any]:
        streams = self._all(streams).contiguous()
        config, phi = self.site.config, self.site.phi.to(streams.dtype)
        h_pre, *mix = self.functional.liger_mhc_coeffs(
            streams, phi, self.site.bias, *self.site.alpha, allow_fp32=streams.dtype == torch.float32,
            tmax=config.sinkhorn_iterations, rms_eps=config.eps_norm,
        )  # fmt: skip
        return self.functional.liger_mhc_pre(streams, h_pre), mix

    def post(self, streams: Tensor, branch: Tensor, mix: Any) -> Tensor:
        return self.functional.liger_mhc_post_res(self._all(streams).contiguous(), branch, *mix)


PEERS: dict[str, type[PeerSite]] = {"hyper-connections": HyperConnections, "liger-kernel": Liger}


def convert_sites(model: nn.Module, peer: str) -> None:
    """Puts a peer's sites in place of the sites of a converted model. There is no way back: take a copy.

    Raises:
        PeerError: the peer is not known, not installed, or can't run this model.
    """
    if peer not in PEERS:
        raise PeerError(f"There is no peer {peer!r}. The known ones are: {', '.join(PEERS)}.")
    for name, site in list(model.named_modules()):
        if isinstance(site, HyperConnection):
            if why := PEERS[peer].missing(site.phi.device.type):
                raise PeerError(f"{peer}: {why}")
            model.set_submodule(name, PEERS[peer](site))
