import os

# read once, when huggingface_hub is imported: no test waits for a network
os.environ["HF_HUB_OFFLINE"] = "1"
