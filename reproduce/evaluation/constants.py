"""Settings of the metrics that others read, too; they load nothing."""

# OpenAI's ViT-B/16. Its weights were trained with QuickGELU: open_clip's plain "ViT-B-16" would
# compute another activation.
CLIP_MODEL = "ViT-B-16-quickgelu"
CLIP_PRETRAINED = "openai"

COCO_PROMPTS = 10_000
