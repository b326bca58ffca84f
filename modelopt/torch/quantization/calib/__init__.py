"""Calibrators: what watches a tensor during calibration, and how the range is chosen from what was seen."""

from modelopt.torch.quantization.calib.histogram import HistogramCalibrator as HistogramCalibrator
from modelopt.torch.quantization.calib.histogram import HistogramObserver as HistogramObserver
from modelopt.torch.quantization.calib.observers import AffineObserver as AffineObserver
from modelopt.torch.quantization.calib.observers import MaxCalibrator as MaxCalibrator
from modelopt.torch.quantization.calib.observers import MaxObserver as MaxObserver
from modelopt.torch.quantization.calib.observers import MinMaxObserver as MinMaxObserver
from modelopt.torch.quantization.calib.observers import Observer as Observer
from modelopt.torch.quantization.calib.weights import MseCalibrator as MseCalibrator
