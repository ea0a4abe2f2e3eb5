"""What is not finite: steps that do not count, and weights that are not saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor


class SkippedSteps:
    """Counts on the device the steps that did not count because their loss or gradient was not finite.

    total: skipped steps of the whole run, a whole number on the device. `in_a_row` is how many of the newest steps were
    skipped, one after the other, `longest` the most that ever were. Nothing waits for the device but `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self.total, self.in_a_row, self.longest = torch.zeros(3, dtype=torch.int64, device=device).unbind()
        # What the host sees: copied while it goes on, so this may be some steps behind.
        self._seen = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")

    def judge(self, norm: Tensor) -> Tensor:
        """Count a step by its gradient's norm over all processes, which is not finite where any loss was not.

        Returns a float scalar, 1 where the step is to be skipped, else 0.
        """
        bad = norm.to(self.total.device, non_blocking=True).isfinite().logical_not()
        self.total += bad
        self.in_a_row.add_(1).mul_(bad)
        torch.maximum(self.longest, self.in_a_row, out=self.longest)
        self._seen.copy_(self.longest, non_blocking=True)
        return bad.float()

    def reached(self, limit: int) -> bool:
        """Whether `limit` steps were skipped in a row, as far as the host has heard by now."""
        return int(self._seen) >= limit

    def read(self) -> dict[str, int]:
        """total, in_a_row and longest, by name. Waits for the device."""
        total, in_a_row, longest = torch.stack([self.total, self.in_a_row, self.longest]).tolist()
        return {"total": total, "in_a_row": in_a_row, "longest": longest}

    def restore(self, counts: dict[str, int]) -> None:
        """Go on from what `read` gave."""
        for name in ("total", "in_a_row", "longest"):
            getattr(self, name).fill_(counts.get(name, 0))
        self._seen.fill_(counts.get("longest", 0))


def spoiled_by(loss: Tensor, scale: Tensor) -> Tensor:
    """The scale of a loss's gradient, nan where the loss is not finite, so that the gradient is not finite either."""
    return torch.where(loss.detach().isfinite(), scale, torch.nan)


def not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first of these tensors that holds nan or infinity, or None. Of a tensor that lies on several
    processes, this process looks at its own part. Waits for the device once."""
    names, largest = [], []
    for name, tensor in named:
        part = getattr(tensor, "ds_tensor", tensor)
        part = part.to_local() if isinstance(part, DTensor) else part
        if part.is_floating_point() and part.numel():
            names.append(name)
            largest.append(torch.linalg.vector_norm(part.detach(), torch.inf).float())
    if not largest:
        return None
    bad = torch.stack([one.to(largest[0].device) for one in largest]).isfinite().logical_not().tolist()
    return next((name for name, is_bad in zip(names, bad, strict=True) if is_bad), None)


def stored_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all safetensors files in a directory, by name."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
