"""Calibration: run a model over data, and gather statistics that any format or algorithm can use afterwards."""

from modelopt.torch.calibration.data import ForwardLoop as ForwardLoop
from modelopt.torch.calibration.data import TokenMask as TokenMask
from modelopt.torch.calibration.data import as_forward_loop as as_forward_loop
from modelopt.torch.calibration.data import select_tokens as select_tokens
from modelopt.torch.calibration.data import token_mask as token_mask
from modelopt.torch.calibration.executor import input_spec as input_spec
from modelopt.torch.calibration.executor import run_forward as run_forward
from modelopt.torch.calibration.statistics import AbsMax as AbsMax
from modelopt.torch.calibration.statistics import ChannelRange as ChannelRange
from modelopt.torch.calibration.statistics import Histogram as Histogram
from modelopt.torch.calibration.statistics import MinMax as MinMax
from modelopt.torch.calibration.statistics import Statistic as Statistic
from modelopt.torch.calibration.statistics import gather as gather
from modelopt.torch.calibration.statistics import load as load
from modelopt.torch.calibration.statistics import save as save
