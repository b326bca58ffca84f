import torch
import torch.nn as nn
from modelopt.torch.quantization import quantize, calibrate

# User model
class MyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(768, 3072)
        self.linear2 = nn.Linear(3072, 768)
    
    def forward(self, x):
        x = self.linear1(x)
        x = torch.nn.functional.relu(x)
        x = self.linear2(x)
        return x

# Initialization
model = MyModel().cuda().eval()

# Quantization configuration
INT8_CFG = {
    "quant_cfg": {
        "*weight_quantizer": {"num_bits": 8},
        "*input_quantizer": {"num_bits": 8},
    },
    "algorithm": "max"
}

# Calibration data
def calibration_loop(model):
    for batch in calibration_dataloader:
        model(batch.cuda())

# Apply quantization
# Behind the scenes:
# 1. recursive_trace(model) extracts FX graphs
# 2. analyze_symbols() finds cross-layer dependencies
# 3. QuantModules inserted with TensorQuantizer wrappers
# 4. calibrate() runs forward pass to compute scales
model = quantize(model, INT8_CFG, forward_loop=calibration_loop)

# Export
model.save_pretrained("quantized_model")
