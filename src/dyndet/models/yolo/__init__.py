"""YOLOv7's parts (Wang et al., CVPR 2023): blocks, backbones, necks, and folding them for inference."""
