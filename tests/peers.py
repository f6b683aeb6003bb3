"""torchvision's DenseNet, imported so that it also loads beside a torch that its C++ operators do not fit."""

import sys
import types

# Where its C++ operators are missing, torchvision fails as it registers their shapes. DenseNet needs none of them.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

from torchvision.models import densenet as _densenet  # noqa: E402

DenseBlock = _densenet._DenseBlock
DenseLayer = _densenet._DenseLayer
DenseNet = _densenet.DenseNet
Transition = _densenet._Transition
densenet121 = _densenet.densenet121
DenseNet121_Weights = _densenet.DenseNet121_Weights
WeightsEnum = _densenet.WeightsEnum
