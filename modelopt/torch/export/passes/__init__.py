"""Passes: functions from Checkpoint to Checkpoint that a writer asks for before it writes."""

from modelopt.torch.export.passes.check_finite import check_finite as check_finite
from modelopt.torch.export.passes.round_scales import round_scales as round_scales
from modelopt.torch.export.passes.share_scales import share_scales as share_scales
