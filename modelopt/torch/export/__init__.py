"""Export: a quantized model to checkpoint directories that engines load, and back.

export(model, directory, writer="compressed-tensors" | "hf")     load(directory, mode)     verify(directory, model)
"""

from modelopt.torch.export.checkpoint import Checkpoint as Checkpoint
from modelopt.torch.export.checkpoint import Deferred as Deferred
from modelopt.torch.export.checkpoint import KVRecord as KVRecord
from modelopt.torch.export.checkpoint import LayerRecord as LayerRecord
from modelopt.torch.export.checkpoint import differences as differences
from modelopt.torch.export.collect import collect as collect
from modelopt.torch.export.export import export as export
from modelopt.torch.export.export import export_hf_checkpoint as export_hf_checkpoint
from modelopt.torch.export.program import export_torch_model as export_torch_model
from modelopt.torch.export.readers import READERS as READERS
from modelopt.torch.export.readers.model import load as load
from modelopt.torch.export.readers.model import read as read
from modelopt.torch.export.verify import VerifyResult as VerifyResult
from modelopt.torch.export.verify import verify as verify
from modelopt.torch.export.writers import WRITERS as WRITERS
