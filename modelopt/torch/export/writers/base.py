"""The part that all writers share: stream layer after layer into shards, then the configuration files.

Writer.why_not(checkpoint) -> str | None      a reason, if the layout has no place for something in the checkpoint
Writer.encode(record, quantized) -> tensors   the tensors of one layer, by their names below the layer's own
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from modelopt import __version__
from modelopt.core.errors import ExportError, ModelOptError
from modelopt.core.logging import Progress, null_progress
from modelopt.numerics.reference import Quantized
from modelopt.torch.export.checkpoint import Checkpoint, KVRecord, LayerRecord
from modelopt.torch.export.files import write_json
from modelopt.torch.export.passes.check_finite import check_finite, check_quantized
from modelopt.torch.export.passes.share_scales import share_scales
from modelopt.torch.export.shards import ShardWriter


class Writer:
    """Base class of the writers. A subclass sets `name` and fills in the methods that raise here."""

    name = ""
    passes: tuple[Callable[[Checkpoint], Checkpoint], ...] = (share_scales, check_finite)

    def why_not_layer(self, record: LayerRecord) -> str | None:
        """Return why the layout has no place for this layer, or None."""
        raise NotImplementedError

    def why_not_kv(self, record: KVRecord) -> str | None:
        """Return why the layout has no place for this key-value cache format, or None."""
        raise NotImplementedError

    def prepare(self, record: LayerRecord, quantized: Quantized) -> Quantized:
        """Bring a packed weight into the types that the layout stores, before `encode`."""
        return quantized

    def encode(self, record: LayerRecord, quantized: Quantized) -> dict[str, Tensor]:
        """Return the tensors of a layer, by their names below the layer's own."""
        raise NotImplementedError

    def encode_kv(self, record: KVRecord, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Return the tensors of a quantized key-value cache, by their full names."""
        raise NotImplementedError

    def config_files(self, checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
        """Return the JSON files of the layout, by file name; `config.json` is the model's with the quantization added."""
        raise NotImplementedError

    def why_not(self, checkpoint: Checkpoint) -> str | None:
        """Return the first reason why this layout cannot hold `checkpoint`, naming the layer, or None."""
        if checkpoint.unsupported:
            return f"{checkpoint.unsupported[0]} is enabled, and a checkpoint of weights has no place for it"
        for record in checkpoint.records():
            reason = self.why_not_layer(record)
            if reason is not None:
                return f"{record.name}: {reason}"
        for kv in checkpoint.kv.values():
            reason = self.why_not_kv(kv)
            if reason is not None:
                return f"{kv.name}: {reason}"
        return None

    def prepared(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint as this layout stores it: passes applied, every weight packed. For tests and verification."""
        for one in self.passes:
            checkpoint = one(checkpoint)
        return checkpoint.map_layers(self._packed)

    def _packed(self, record: LayerRecord) -> LayerRecord:
        quantized = record.quantized()
        if quantized is None:
            return record
        quantized = self.prepare(record, quantized)
        return LayerRecord(**{**record.__dict__, "weight": quantized, "weight_format": quantized.format})

    def tensors(self, checkpoint: Checkpoint, progress: Progress = null_progress) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the layout with its full name; one layer at a time is packed."""
        total = len(checkpoint.layers)
        for done, record in enumerate(checkpoint.records()):
            progress(done, total, "export")
            yield from self.layer_tensors(record)
        progress(total, total, "export")
        for kv in checkpoint.kv.values():
            yield from self.encode_kv(kv, checkpoint).items()
        for name, tensor in checkpoint.tensors.items():
            yield name, tensor.to(checkpoint.cast) if checkpoint.cast is not None and tensor.is_floating_point() else tensor

    def layer_tensors(self, record: LayerRecord) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of one layer with their full names. Raises ExportError that names the layer."""
        try:
            quantized = record.quantized()
        except ModelOptError as error:
            raise ExportError(f"{record.name}: {error}") from error
        if quantized is None:
            raise ExportError(f"{record.name} has a quantized input and a plain weight; the layout {self.name} cannot say that.")
        check_quantized(record.name, quantized)
        for key, tensor in self.encode(record, self.prepare(record, quantized)).items():
            yield f"{record.name}.{key}", tensor

    def write(
        self, checkpoint: Checkpoint, directory: Path, max_shard_size: int | str = "10GB", progress: Progress = null_progress
    ) -> ShardWriter:
        """Write weights and configuration into the existing `directory`. Raises ExportError if `why_not` has a reason."""
        reason = self.why_not(checkpoint)
        if reason is not None:
            raise ExportError(f"The layout {self.name} cannot hold this model. {reason}.")
        for one in self.passes:
            checkpoint = one(checkpoint)
        with ShardWriter(directory, max_shard_size) as shards:
            for name, tensor in self.tensors(checkpoint, progress):
                shards.add(name, tensor)
        for name, data in self.config_files(checkpoint).items():
            write_json(directory / name, data)
        return shards


def producer() -> dict[str, str]:
    """Return who wrote a checkpoint."""
    return {"name": "modelopt", "version": __version__}
