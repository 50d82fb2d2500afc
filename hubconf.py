"""The project for torch.hub: a network that segments images into classes that you name.

network = torch.hub.load(FOLDER, "segmenter", source="local")           # or "OWNER/REPOSITORY" without source
mask, confidence = network.segment(image, ["cat", "sofa", "zebra"])     # image: uint8 [H, W, 3]
network.classes                                                         # class name -> value in the mask
"""

from model.predictor import SHIPPED, Predictor

dependencies = ["torch", "torchvision", "numpy", "PIL", "scipy", "tqdm"]


def segmenter(checkpoint=SHIPPED) -> Predictor:
    """The network of a checkpoint, in evaluation mode on the CPU: images uint8 [N, 3, H, W] -> logits [N, K, H, W]."""
    return Predictor(checkpoint)


def segment(image, class_names=None, checkpoint=SHIPPED):
    """Mask and confidence, uint8 and float32 [H, W], of an image uint8 [H, W, 3]; see `Predictor.segment`."""
    return segmenter(checkpoint).segment(image, class_names)
